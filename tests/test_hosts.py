"""Several processes on this machine are one run: the same numbers, samples and files."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grain
import pytest

from jaxrlhf import hosts
from jaxrlhf.data import batches
from jaxrlhf.files import UserError

LOCAL = Path(__file__).parent.parent / "launch" / "local.py"
COMMAND = "import sys; from jaxrlhf import main; sys.argv = ['jaxrlhf', *sys.argv[1:]]; main.console()"
TRAINED = ("pretrain", "sft", "reward", "ppo")
# Every stage, small; three prompts a split do not fill a batch, and no two stages need a sampler of their own.
TINY = {
    "model": {"layers": 2, "width": 16, "ff_width": 24, "freeze_layers": 0.5},
    "world": {
        "documents": 60,
        "demonstrations": 40,
        "preference_prompts": 16,
        "ppo_prompts": 30,
        "evaluation_prompts": 3,
    },
    "pretrain": {"init": "scratch", "batch_size": 8, "loop.steps": 3, "loop.log_every": 1},
    "sft": {"batch_size": 8, "loop.steps": 4, "loop.save_every": 2, "loop.log_every": 1},
    "reward": {"batch_size": 8, "samples_per_prompt": 2, "normalise_samples": 8, "loop.steps": 3, "loop.eval_every": 0},
    "ppo": {"batch_size": 8, "epochs": 2, "minibatches": 2, "loop.steps": 4, "loop.save_every": 2, "loop.log_every": 1},
    "sampling": {"batch_size": 4, "samples_per_prompt": 2, "best_of": 2, "pool": 2},
    "evaluation": {"bootstrap": 20},
}


def command(workdir, stage="run"):
    changes = [f"--config.{s}.{k}={v}" for s, keys in TINY.items() for k, v in keys.items()]
    words = [stage, "--config=configs/quickstart.py:smoke", f"--workdir={workdir}", *changes]
    return [sys.executable, "-c", COMMAND, *words]


def local(count, *words, devices=1):
    return [sys.executable, LOCAL, "-n", str(count), f"--devices-per-process={devices}", "--", *map(str, words)]


def finish(argv):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", autouse=True)
def cheap_starts(tmp_path_factory, request):
    """Compiled once for all commands of this file, and not optimised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        patch.setenv("PYTHONPATH", str(request.config.rootpath))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    finish(command(workdir))
    return workdir


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_metrics(ours, theirs, stages=TRAINED):
    for stage in stages:
        a, b = (lines(w / stage / "metrics.jsonl") for w in (ours, theirs))
        assert [r.keys() for r in a] == [r.keys() for r in b]
        for x, y in zip(a, b, strict=True):
            for name in [n for n in x if n.endswith("clip_fraction")]:
                # Counts what passes a threshold: rounding moves it by one item of a minibatch.
                assert x.pop(name) == pytest.approx(y.pop(name), abs=0.02)
            assert x == pytest.approx(y, rel=1e-5, abs=1e-5)


def same_run(ours, theirs):
    same_metrics(ours, theirs)
    files = [
        {str(p.relative_to(w)) for p in w.rglob("*") if p.is_file() and not {"tensorboard", "checkpoints"} & {*p.parts}}
        for w in (ours, theirs)
    ]
    assert files[0] == files[1]
    samples = sorted(theirs.glob("samples/*/*.jsonl"))
    assert len(samples) == 3 * 5
    numbers = ("scores", "reference_score", "kl")
    for path in samples:
        for x, y in zip(lines(ours / path.relative_to(theirs)), lines(path), strict=True):
            for name in x.keys() & {*numbers}:
                assert x.pop(name) == pytest.approx(y.pop(name), abs=1e-5)
            assert x == y
    for split in theirs.glob("reward/preferences/*.jsonl"):
        assert (ours / split.relative_to(theirs)).read_bytes() == split.read_bytes()


@pytest.mark.slow
def test_two_processes_are_one_run_and_go_on_as_one(tmp_path):
    """At the end, and from what two of them saved after two steps of PPO."""
    workdirs = one, two = tmp_path / "one", tmp_path / "two"
    going = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for argv in (command(one), local(2, *command(two)))
    ]
    for workdir, process in zip(workdirs, going, strict=True):
        said, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
        assert said.count("index.html") == 1
        for stage in TRAINED:  # host 0 alone writes events
            assert len(list((workdir / stage / "tensorboard").iterdir())) == 1
    same_run(two, one)
    shutil.rmtree(two / "ppo" / "checkpoints" / "4")
    (two / "ppo" / "summary.json").unlink()
    assert "resumed at step 2 of 4" in finish(command(two, "ppo")).stderr
    same_metrics(two, one, ("ppo",))


@pytest.mark.slow
def test_four_processes_are_one_run(one, tmp_path):
    finish(local(4, *command(tmp_path)))
    same_run(tmp_path, one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_as_two_it_ends_as_one(one, tmp_path, number, monkeypatch):
    """Asked to stop, for a launcher that starts it again, or one of the two killed, which ends the other."""
    monkeypatch.setenv("JAXRLHF_RESTARTS", "1")
    workdir = tmp_path / "run"
    going = subprocess.Popen(local(2, *command(workdir)), stderr=subprocess.PIPE, text=True)
    metrics = workdir / "reward" / "metrics.jsonl"  # steps are left, as JAX names one some steps ahead
    while going.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    if number == signal.SIGTERM:
        going.terminate()
    else:
        processes = Path(f"/proc/{going.pid}/task/{going.pid}/children").read_text().split()
        os.kill(int(processes[1]), number)
    said = going.communicate(timeout=120)[1]
    assert going.returncode == (os.EX_TEMPFAIL if number == signal.SIGTERM else 128 + number), said
    if number == signal.SIGTERM:
        assert said.count("saved; the same command goes on") == 1
    else:
        assert "[process 1] ended by SIGKILL\n" in said
    assert not (workdir / "samples").exists()
    finish(command(workdir))
    same_run(workdir, one)


@pytest.mark.slow
def test_two_processes_with_a_bucket_and_no_shared_folder(one, tmp_path):
    """A folder stands in for the bucket; the second command has nothing else to go on from."""
    bucket = tmp_path / "bucket"
    finish(local(2, *command(f"file://{bucket}")))
    shutil.rmtree(bucket / "ppo" / "checkpoints" / "4")
    for gone in (bucket / "ppo" / "summary.json", bucket / "results.json"):
        gone.unlink()
    assert "resumed at step 2 of 4" in finish(local(2, *command(f"file://{bucket}"))).stderr
    same_run(bucket, one)


def test_a_mistake_is_everybodys(tmp_path):
    words = [w for w in command(tmp_path) if "sft.batch_size" not in w and "loop.steps" not in w]
    argv = local(2, *words, "--config.pretrain.loop.steps=1", "--config.pretrain.batch_size=7")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error: config.pretrain.batch_size=7 does not divide over data x fsdp = 2") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "config.json").exists()  # nothing was made: the corrected config may have the workdir


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """What each of two processes with two devices found, and said when process 1 was killed at the end.

    Process 1 did not come to the last step in time.
    """
    folder = tmp_path_factory.mktemp("agreed")
    argv = local(2, sys.executable, Path(__file__).with_name("hosts_program.py"), folder, "1.5", devices=2)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 128 + signal.SIGKILL, done.stderr[-3000:]
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)], done


def test_a_process_makes_the_rows_of_its_own_devices(agreed):
    """Of 4 packed rows, of 8, for every mesh; and together they are the batch that one process makes."""
    whole = {"sft": 4, "sft on responses": 4, "prompts": 8, "pairs": 4, "joined": 8}
    for found in agreed[0]:
        for mesh, rows in found["rows"].items():
            share = 1 if mesh == "(1, 1, 4)" else 2  # there each device has every row
            assert rows == {name: [count // share, True] for name, count in whole.items()}, mesh


def test_host_0_decides_and_writes(agreed):
    assert [f["writes"] for f in agreed[0]] == [True, False]
    for found in agreed[0]:
        assert found["decided"] == '{"seen by": 0}'
        assert found["user"] == "UserError: config.x=1: must be 2"
        assert found["failure"] == "Failure: the disk is full"
        assert found["alone"] == "[false, 0, 2]"
        assert found["in turn"] == found["process"]
        assert found["written"] == "0"


def test_a_barrier_names_who_is_missing(agreed):
    first, second = agreed[0]
    assert first["missing"] == "the last step: after 1.5 s process 1 of 0 to 1 is missing; its log may say why"
    assert second["missing"] == "the last step: after 1.5 s this process is too late"


def test_who_is_killed_is_named(agreed):
    """By the other process, when it misses its rows, and by what started both."""
    last = agreed[1].stdout.splitlines()[-1]
    assert last.startswith("|after 5 s process 1 of 0 to 1 is missing; its log may say why (")
    assert last.endswith("; the same command goes on")
    assert "[process 1] ended by SIGKILL\n" in agreed[1].stderr


@pytest.mark.slow
def test_processes_may_be_apart_at_a_collective():
    """For longer than Gloo waits at the first one: one has its programs from a cache, the other compiles."""
    program = (
        "from jaxrlhf import hosts; hosts.start()\n"
        "import jax, time; from jax.experimental import multihost_utils\n"
        "time.sleep(35 * jax.process_index())\n"
        "print(multihost_utils.process_allgather(jax.numpy.float32(jax.process_index() + 0.5)).tolist())"
    )
    assert finish(local(2, sys.executable, "-c", program)).stdout.splitlines()[-1] == "[0.5, 1.5]"


def test_batches_are_those_of_grain():
    """A batch made row by row is the batch that Grain cuts from the shuffled epochs."""
    records = [{"id": str(i)} for i in range(7)]
    theirs = grain.MapDataset.source([r["id"] for r in records]).seed(3).shuffle().repeat(None)
    theirs = theirs.batch(3, drop_remainder=True, batch_fn=list)
    ours = batches.ids(records, batch_size=3, seed=3)
    assert [ours[i] for i in range(12)] == [theirs[i] for i in range(12)]


def test_who_never_comes_is_named_at_the_start(monkeypatch):
    """Of three processes, 0 and 2 are there: both say that 1 is missing, and neither waits for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = (
        "from jaxrlhf import files, hosts\ntry: hosts.start(seconds=4)\nexcept files.Failure as failure: print(failure)"
    )
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3"}
    there = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | shared | {"JAX_PROCESS_ID": i},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in ("2", "0")
    ]
    for process in there:
        said = process.communicate(timeout=60)[0]
        assert said == "after 4 s process 1 of 0 to 2 is missing; its log may say why\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=: must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x: must be a whole number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be from 0 to"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS=: must be HOST:PORT"),
    ],
)
def test_an_environment_that_is_not_whole_is_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        hosts.start()


# ---- launch/local.py, on commands without JAX


def test_a_command_that_is_not_there():
    done = subprocess.run(
        [sys.executable, LOCAL, "-n", "2", "--", "nosuchcommand"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "local.py: error: nosuchcommand: No such file or directory",
    )


def test_the_first_to_fail_is_told_and_the_others_ended(tmp_path):
    program = (
        "import os, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit('no room on this host')\n"
        f"open({str(tmp_path / 'began')!r}, 'w'); time.sleep(100)"
    )
    began = time.monotonic()
    done = subprocess.run(local(3, sys.executable, "-c", program), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "[process 1] no room on this host\n"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
def test_a_signal_reaches_every_process(tmp_path, interrupts):
    """Also where Ctrl-C was ignored when the launcher began, as shells have it of what runs in the background."""
    program = (
        "import os, sys, time\n"
        "try:\n"
        f"    open({str(tmp_path)!r} + '/' + os.environ['JAX_PROCESS_ID'], 'w'); time.sleep(100)\n"
        "except KeyboardInterrupt: print('stopped')"
    )
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        going = subprocess.Popen(local(2, sys.executable, "-c", program), stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with contextlib.suppress(TimeoutError):
        for _ in range(300):
            if len(list(tmp_path.iterdir())) == 2:
                break
            time.sleep(0.1)
    time.sleep(0.3)
    going.terminate()
    assert going.communicate(timeout=30)[0] == "stopped\n"
    assert going.returncode == 0
