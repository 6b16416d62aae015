"""Killed at any moment of any stage, the same command goes on and leaves the same bytes."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from jaxrlhf import main

COMMAND = "import sys; from jaxrlhf import main; sys.argv = ['jaxrlhf', *sys.argv[1:]]; main.console()"
FORKS = multiprocessing.get_context("forkserver")
# Every stage, as small as it comes; PPO with several epochs, and a batch of evaluation that prompts do not fill.
TINY = {
    "model": {"layers": 2, "width": 16, "ff_width": 24, "freeze_layers": 0.5},
    "world": {
        "documents": 90,
        "demonstrations": 50,
        "preference_prompts": 16,
        "ppo_prompts": 30,
        "evaluation_prompts": 3,
    },
    "pretrain": {"init": "scratch", "batch_size": 8, "loop.steps": 5, "loop.save_every": 2, "loop.log_every": 1},
    "sft": {"batch_size": 8, "loop.steps": 7, "loop.save_every": 2, "loop.eval_every": 2, "loop.log_every": 2},
    "reward": {"batch_size": 8, "normalise_samples": 8, "loop.steps": 5, "loop.eval_every": 0, "loop.save_every": 2},
    "ppo": {"batch_size": 6, "epochs": 3, "minibatches": 2, "kl_target": 3.5, "loop.steps": 5, "loop.save_every": 2},
    "sampling": {"batch_size": 2, "samples_per_prompt": 2, "best_of": 2, "pool": 4},
    "evaluation": {"bootstrap": 20},
}


def arguments(workdir):
    changes = [f"--config.{s}.{k}={v}" for s, keys in TINY.items() for k, v in keys.items()]
    return ["run", "--config=configs/quickstart.py:smoke", f"--workdir={workdir}", *changes]


@pytest.fixture(scope="module", autouse=True)
def cheap_starts(tmp_path_factory, request):
    """Compiled once, for all commands of this file, and not optimised; imported once, for those that are stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        FORKS.set_forkserver_preload(["jaxrlhf.stages", "jaxrlhf.main", "tensorboardX", "test_resume"])
        yield


def finish(workdir):
    argv = [sys.executable, "-c", COMMAND, *arguments(workdir)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def begin(argv, said):
    """The command, in a process that has imported it already."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["jaxrlhf", *argv]
    main.console()


def parts(workdir):
    """What is there to be seen of progress, as a fine clock: files and folders, and lines of metrics."""
    found = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if "tensorboard" not in p.parts}
    for path in workdir.glob("*/metrics.jsonl"):
        found |= {f"{path}:{i}" for i in range(path.read_bytes().count(b"\n"))}
    return found


def interrupt(workdir, seen, moment, number):
    """Runs until `moment` parts were seen, in this start or an earlier one, then sends the signal.

    But for SIGKILL, not before the command is under way: until then Python itself is what hears it.

    Returns whether it lived so long, its exit status and what it said.
    """
    said = workdir.parent / "said"
    said.write_text("")
    going = FORKS.Process(target=begin, args=(arguments(workdir), said))
    going.start()
    while going.is_alive() and (len(seen) < moment or (number != signal.SIGKILL and not said.stat().st_size)):
        with contextlib.suppress(FileNotFoundError):  # gone while we looked
            seen |= parts(workdir)
        time.sleep(0.01)
    lived = going.is_alive()
    if lived:
        os.kill(going.pid, number)
    going.join(300)
    return lived, going.exitcode, said.read_text()


def contents(workdir):
    """Files by their bytes, checkpoints by their arrays, data by its records; no timings, no events."""
    found = {}
    for path in sorted(p for p in workdir.rglob("*") if p.is_file()):
        name = str(path.relative_to(workdir))
        if path.suffix == ".array_record-00000-of-00001":
            split = path.name.split(".")[0].split("-")[1]
            found[name] = list(tfds.builder_from_directory(path.parent).as_data_source(split=split))
        elif path.name != "timings.jsonl" and not {"tensorboard", "checkpoints"} & set(path.parts):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for step in workdir.glob("*/checkpoints/*"):
        for item in ("params", "rest"):
            tree = ocp.StandardCheckpointer().restore(step / item)
            leaves = [(str(k), np.asarray(v).tobytes()) for k, v in jax.tree_util.tree_leaves_with_path(tree)]
            found[str(step.relative_to(workdir) / item)] = hashlib.sha256(repr(leaves).encode()).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(workdir)
    return workdir


def check(workdir, whole):
    ours, theirs = contents(workdir), contents(whole)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k] != theirs[k]] == []
    for stage in ("pretrain", "sft", "reward", "ppo"):
        steps = [json.loads(line)["step"] for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def at_random(workdir, whole, numbers, seed):
    """Signals at random moments, one start after another, then to the end."""
    rng, seen, total = random.Random(seed), set(), len(parts(whole))
    moments = sorted(rng.sample(range(total // 20, total), len(numbers)))
    lived = 0
    for moment, number in zip(moments, rng.sample(numbers, len(numbers)), strict=True):
        still, status, said = interrupt(workdir, seen, moment, number)
        lived += still
        assert "Traceback" not in said
        if number != signal.SIGKILL:
            assert status == 0, said
            assert "the same command goes on" in said or (workdir / "report" / "index.html").exists()
    finish(workdir)
    check(workdir, whole)
    assert lived > len(numbers) // 2


def test_killed_four_times_and_asked_to_stop_it_ends_the_same(tmp_path, whole):
    at_random(tmp_path / "run", whole, [signal.SIGKILL] * 4 + [signal.SIGTERM], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_twenty_moments_it_ends_the_same(tmp_path, whole, seed):
    numbers = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGINT]
    at_random(tmp_path / "run", whole, numbers, seed)
