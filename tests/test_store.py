"""Workdirs named by a URL; a folder, by file://, stands in for a bucket."""

import os
import subprocess
import sys

import pytest
from etils import epath

from jaxrlhf import main, store
from jaxrlhf.files import Failure, UserError


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_changes_goes_there_and_what_is_there_comes_back(tmp_path):
    bucket = tmp_path / "bucket" / "run"
    write(bucket, config="1", sft__metrics="a\n", sft__checkpoints__4__params="big")
    with store.opened(f"file://{bucket}") as kept:
        assert tree(kept.local) == {"config": "1", "sft/metrics": "a\n"}  # checkpoints stay where they are
        assert kept.checkpoints("sft") == epath.Path(bucket / "sft" / "checkpoints")
        write(kept.local, sft__metrics="a\nb\n", reward__summary="{}")
        (kept.local / "config").unlink()
        (kept.local / ".half.partial").write_text("half")
        kept.send()
        assert tree(bucket) == {
            "sft/metrics": "a\nb\n",
            "reward/summary": "{}",
            "sft/checkpoints/4/params": "big",
        }
        write(kept.local, report="last")
        folder = kept.local
    assert tree(bucket)["report"] == "last"
    assert not folder.exists()


def test_only_what_changed_is_sent(tmp_path):
    bucket = tmp_path / "bucket"
    write(bucket, old="1", other="2")
    with store.opened(f"file://{bucket}") as kept:
        write(bucket, old="changed there")
        write(kept.local, other="3")
    assert tree(bucket) == {"old": "changed there", "other": "3"}


def test_what_is_done_is_sent_when_something_fails(tmp_path):
    bucket = tmp_path / "bucket"

    def work():
        with store.opened(f"file://{bucket}") as kept:
            write(kept.local, a="1")
            raise Failure(f"{kept.local / 'a'} is odd")

    with pytest.raises(Failure, match=f"^{bucket}/a is odd$"):
        work()
    assert tree(bucket) == {"a": "1"}


def test_a_folder_is_itself(tmp_path):
    with store.opened(str(tmp_path / "run")) as kept:
        assert kept.local == tmp_path / "run"
        assert kept.checkpoints("ppo") == tmp_path / "run" / "ppo" / "checkpoints"
        kept.fetch()
        kept.send()
    assert not (tmp_path / "run").exists()


def test_what_a_bucket_takes_is_named():
    """In a process of its own, where gcsfs cannot be found."""
    program = (
        "import sys; sys.modules['gcsfs'] = None\nfrom jaxrlhf import store\nwith store.opened('gs://bucket/x'): pass"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.stderr.splitlines()[-1].startswith(f"{UserError.__module__}.UserError: --workdir=gs://bucket/x: ")
    assert "pip install 'jaxrlhf[gs]'" in done.stderr


def test_commands_without_a_recipe_take_folders(capsys):
    assert main.main(["jaxrlhf", "report", "--workdir=gs://bucket/x"]) == 2
    assert "copy the workdir to a folder" in capsys.readouterr().err
