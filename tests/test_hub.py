"""Imports by hub id from a server on this machine; in processes of their own, as the client reads its address once."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import COMMIT, serving
from test_exchange import base

from jaxrlhf import hub
from jaxrlhf.files import UserError

KEY = "hf_thisIsNobodysToken"
PROGRAM = """
import sys
from jaxrlhf.main import main
print([main(["jaxrlhf", "import", f"--from={name}", f"--workdir={sys.argv[1]}"]) for name in sys.argv[2:]])
"""
NOT_NEEDED = (
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "consolidated.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/model.safetensors",
    "README.md",
    "modeling_own.py",
)


def imports(tmp_path, endpoint, *names):
    """`jaxrlhf import` of each, from an empty cache, in one process."""
    changed = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": KEY, "HF_HUB_DISABLE_XET": "1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | changed
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    return done


def test_an_import_by_id_fetches_what_is_read_and_records_the_commit(tmp_path):
    directory = base(tmp_path / "theirs")
    for name in NOT_NEEDED:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"not for us")
    with serving(directory) as (endpoint, served):
        done = imports(tmp_path, endpoint, "tiny/open")
        fetched = {path.split(f"resolve/{COMMIT}/")[1] for path in served.asked if "/resolve/" in path}
    assert done.stdout.endswith("[0]\n"), done.stderr
    assert done.stdout.startswith(f"from           tiny/open at commit {COMMIT}\nfamily         llama")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= fetched
    assert fetched == {p.name for p in directory.iterdir() if p.is_file()} - set(NOT_NEEDED)
    assert f"Bearer {KEY}" in served.keys
    mark = json.loads((tmp_path / "run" / "base" / "jaxrlhf.json").read_text())
    assert (mark["base"], mark["commit"]) == ("tiny/open", COMMIT)
    assert (tmp_path / "run" / "base" / "model.safetensors").read_bytes() == served.files["model.safetensors"]


REFUSED = {
    "tiny/gated": "it is gated; ask for access on its page, then `hf auth login`, or set HF_TOKEN",
    "tiny/absent": "no model of that id, or a private one",
    "tiny/broken": "500",
}


def test_what_the_hub_refuses_is_one_line_each(tmp_path):
    with serving(tmp_path) as (endpoint, _):
        done = imports(tmp_path, endpoint, *REFUSED)
    unreachable = imports(tmp_path, "http://127.0.0.1:9", "tiny/open")
    assert (done.stdout, unreachable.stdout) == ("[2, 2, 2]\n", "[2]\n")
    lines = (done.stderr + unreachable.stderr).splitlines()
    for line, (name, says) in zip(lines, (REFUSED | {"tiny/open": "find the appropriate"}).items(), strict=True):
        assert line.startswith(f"error: --from='{name}': no such directory, and not to be had from the hub")
        assert says in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "a/b/c", "with space", "tiny/op?n"])
def test_what_cannot_be_an_id_is_not_asked_for(name):
    with pytest.raises(UserError, match="no such directory, and no hub id"):
        hub.directory_of(name, "--from")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors'\: is a file; name the directory"):
        hub.directory_of(str(tmp_path / "model.safetensors"), "--from")
