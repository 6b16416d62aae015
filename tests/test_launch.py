"""The launch scripts, by their dry runs: what they would do, word by word."""

import os
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SLICE = ("--name=rlhf", "--zone=us-west4-a", "--type=v5litepod-64", "--dry-run")
COMMAND = ("run", "--config=configs/tldr.py:llama-7b,full", "--workdir=gs://b/tldr", "--config.name=it's $HOME")


def script(name, *words, env=None):
    return subprocess.run([LAUNCH / name, *words], capture_output=True, text=True, check=False, env=env)


def stand_ins(folder, **programs):
    """An environment in which these programs come first; each writes down how it was called."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >>{folder}/said\n{body}\n')
        path.chmod(0o755)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def said(folder):
    return (folder / "said").read_text().splitlines()


def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", *LAUNCH.glob("*.sh")], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_a_tpu_slice_is_made_set_up_and_run():
    found = script("tpu_pod.sh", *SLICE, "--queued", "--spot", "--delete", "--project=p", "--", *COMMAND)
    assert found.returncode == 0
    lines = [shlex.split(line) for line in found.stdout.splitlines()]
    what = [line[3:5] for line in lines if line[0] == "gcloud"]
    assert what == [
        ["queued-resources", "create"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["queued-resources", "delete"],
    ]
    assert all({"--zone=us-west4-a", "--project=p", "--quiet"} <= set(line) for line in lines if line[0] == "gcloud")
    assert {"--spot", "--accelerator-type=v5litepod-64", "--node-id=rlhf"} <= set(lines[0])
    remote = next(w for w in lines[4] if w.startswith("--command=")).removeprefix("--command=")
    # The remote shell gets the words that were given here, whatever is in them.
    assert shlex.split(remote.split("&& ", 1)[1]) == [
        "JAXRLHF_HOSTS=auto",
        "JAXRLHF_RESTARTS=1",
        ".venv/bin/jaxrlhf",
        *COMMAND,
    ]
    plain = script("tpu_pod.sh", *SLICE, "--", *COMMAND).stdout
    assert "tpu-vm create rlhf" in plain
    assert "delete" not in plain
    assert "--spot" not in plain


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--zone=z", "--type=t", "--", *COMMAND), "--name"),
        ((*SLICE,), "command is missing"),
        ((*SLICE, "run"), "run: not a flag"),
        ((*SLICE, "--tries=0", "--", *COMMAND), "--tries=0"),
        ((*SLICE, "--", "run", "--workdir=runs/x"), "--workdir=runs/x"),
    ],
)
def test_a_mistake_is_named_in_one_line(words, names):
    found = script("tpu_pod.sh", *words)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert names in found.stderr


def test_slurm_runs_the_command_in_every_task():
    found = script("slurm.sh", "--dry-run", *COMMAND)
    line = shlex.split(found.stdout)
    assert line[:2] == ["JAXRLHF_RESTARTS=1", "srun"]
    assert line[-len(COMMAND) :] == list(COMMAND)
    assert line[-len(COMMAND) - 1].endswith("/bin/jaxrlhf")
    directives = [w for w in (LAUNCH / "slurm.sh").read_text().splitlines() if w.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120"} <= set(directives)
    assert script("slurm.sh").returncode == 2


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_a_slurm_job_that_was_stopped_is_queued_again(tmp_path, status, requeued):
    env = stand_ins(tmp_path, srun=f'[ "$JAXRLHF_RESTARTS" = 1 ] && exit {status}', scontrol=":")
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    assert script("slurm.sh", *COMMAND, env=env).returncode == status
    assert ("scontrol requeue 17" in said(tmp_path)) == requeued


# A slice that is taken away in its first run: afterwards it, and what asked for it, are as `then` says.
GCLOUD = """
state=$(cat {0}/state) asked=$(cat {0}/asked)
case "$*" in
  *"tpu-vm describe"*) [ "$state" != ABSENT ] && echo "$state" ;;
  *"queued-resources describe"*) [ "$asked" != ABSENT ] && echo "$asked" ;;
  *"queued-resources create"*) [ "$asked" = ABSENT ] && echo ACTIVE >{0}/asked && echo READY >{0}/state ;;
  *"tpu-vm create"*) [ "$state" = ABSENT ] && echo READY >{0}/state ;;
  *" delete "*) echo ABSENT >{0}/state && echo ABSENT >{0}/asked ;;
  *bin/jaxrlhf*) [ -e {0}/ran ] || {{ touch {0}/ran && {1} && exit 255; }} ;;
esac
"""


@pytest.mark.parametrize("flags", [(), ("--queued", "--spot")])
@pytest.mark.parametrize("left", ["ABSENT", "PREEMPTED"])
def test_a_slice_that_is_taken_away_is_made_anew(tmp_path, flags, left):
    then = f"echo {left} >{tmp_path}/state && echo SUSPENDED >{tmp_path}/asked"
    env = stand_ins(tmp_path, gcloud=GCLOUD.format(tmp_path, then), sleep=":")
    for name in ("state", "asked"):
        (tmp_path / name).write_text("ABSENT\n")
    words = [w for w in SLICE if w != "--dry-run"]
    found = script("tpu_pod.sh", *words, *flags, "--", *COMMAND, env=env)
    assert found.returncode == 0, found.stderr
    assert "taken away (1 of 20 tries)" in found.stderr
    told = said(tmp_path)
    assert len([line for line in told if ".venv/bin/jaxrlhf" in line]) == 2
    assert len([line for line in told if " create " in line]) == 2


def test_a_command_that_fails_on_a_slice_that_stays_is_not_tried_again(tmp_path):
    env = stand_ins(tmp_path, gcloud=GCLOUD.format(tmp_path, "true"), sleep=":")
    for name in ("state", "asked"):
        (tmp_path / name).write_text("READY\n")
    found = script("tpu_pod.sh", *[w for w in SLICE if w != "--dry-run"], "--", *COMMAND, env=env)
    assert found.returncode == 255
    assert "failed on a slice that is still there" in found.stderr
    assert not [line for line in said(tmp_path) if " create " in line or " delete " in line]


def test_the_jobset_is_whole():
    names = {
        "NAME": "tldr",
        "IMAGE": "r/p/jaxrlhf:1",
        "HOSTS": "8",
        "CHIPS": "8",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "8x8",
        "CONFIG": "configs/tldr.py:llama-7b",
        "WORKDIR": "gs://b/tldr",
    }
    text = (LAUNCH / "gke.yaml").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = yaml.safe_load(string.Template(body).substitute(names))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (found["kind"], job["parallelism"], job["completions"]) == ("JobSet", 8, 8)
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["jaxrlhf", "run", "--config=configs/tldr.py:llama-7b", "--workdir=gs://b/tldr"]
    assert container["env"] == [
        {"name": "JAXRLHF_HOSTS", "value": "auto"},
        {"name": "JAXRLHF_RESTARTS", "value": "1"},
    ]
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
