"""What is wrong with a directory or a workdir: one line that names it, exit status 2, and nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_exchange import base

from jaxrlhf import weights
from jaxrlhf.main import main

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return base(tmp_path_factory.mktemp("good"))


def configured(**options):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))

    return change


def tensors(change):
    def changed(folder):
        found = load_file(folder / SINGLE)
        change(found)
        save_file(found, folder / SINGLE)

    return changed


def sharded(change):
    """In two shards, with the index changed."""

    def changed(folder):
        arch, params = weights.load(folder)
        (folder / SINGLE).unlink()
        size = sum(x.nbytes for x in params["blocks"]["up"].values())
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        weights.export(folder, arch, params, special, shard_bytes=12 * size)
        assert (folder / INDEX).exists()
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return changed


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def bytes_kept(keep):
    return lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:keep])


def eight_bits(folder):
    """A header that tells of f8, as checkpoints of quantised models have."""
    raw = (folder / SINGLE).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    lost = header[UP]["data_offsets"][1] - header[UP]["data_offsets"][0]
    start, width = header[UP]["data_offsets"][0], lost // 4
    for name, told in header.items():
        if name not in ("__metadata__", UP) and told["data_offsets"][0] > start:
            told["data_offsets"] = [x - lost + width for x in told["data_offsets"]]
    header[UP] |= {"dtype": "F8_E4M3", "data_offsets": [start, start + width]}
    head = json.dumps(header).encode()
    body = raw[8 + n :]
    (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + body[: start + width] + body[start + lost :])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            tensors(lambda found: found.update({"score.weight": np.zeros((1, 8), np.float32)})),
            "holds score.weight: a reward model, which has no output head and cannot be a base; PPO trains against it "
            "with --config.reward.init=",
        ),
        (lambda f: (f / SINGLE).unlink(), ": no model.safetensors; where PyTorch is installed"),
        (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "only pytorch_model.bin, which can run code"),
        (bytes_kept(-3), f"{SINGLE}: not a whole safetensors file"),
        (bytes_kept(0), f"{SINGLE}: not a whole safetensors file"),
        (bytes_kept(4), f"{SINGLE}: not a whole safetensors file"),
        (text(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0"), "not a whole safetensors file"),
        (
            sharded(lambda f, _: (f / "model-00002-of-00002.safetensors").unlink()),
            f"model-00002-of-00002.safetensors: no such file, though {INDEX} places model.",
        ),
        (
            sharded(lambda _, index: index.update({"model.layers.7.x": "model-00001-of-00002.safetensors"})),
            f"{INDEX}: weight_map places model.layers.7.x in model-00001-of-00002.safetensors, which does not hold it",
        ),
        (sharded(lambda _, index: index.clear()), f"{INDEX}: weight_map does not name model-00001-of-00002"),
        (tensors(lambda t: t.update(stray=np.zeros((2,), np.float32))), "does not ask for: stray"),
        (tensors(lambda t: t.pop(UP)), f"not stored: {UP}"),
        (tensors(lambda t: t.update({UP: t[UP][:-1]})), f"{SINGLE}: {UP} is [23, 16]; the config asks for [24, 16]"),
        (tensors(lambda t: t.update({UP: t[UP].astype(np.float64)})), f"{SINGLE}: tensor {UP} is float64"),
        (eight_bits, f"{SINGLE}: tensor {UP} is F8_E4M3; expected F32, F16, BF16"),
        (tensors(lambda t: t.update({"lm_head.weight": np.ones((300, 16), np.float32)})), "but config.json ties them"),
        (configured(tie_word_embeddings=False), "not stored: lm_head.weight"),
        (configured(model_type="mamba"), "config.json: model_type='mamba': expected one of llama"),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), "config.json: quantization_config"),
        (configured(num_hidden_layers=10**9), "config.json: num_hidden_layers=1000000000: must be at most"),
        (text("config.json", "{'model_type': 'llama'}"), "config.json:1: not valid JSON"),
        (text("config.json", ""), "config.json: the file is empty"),
        (text("config.json", "[]"), "config.json: model_type=None"),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (text("adapter_config.json", "{}"), "adapter_config.json: an adapter (LoRA), not a whole model; merge it"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in it; expected tokenizer.json"),
        (text("tokenizer.json", "{}"), "its tokenizer does not load as a fast one"),
        (text("tokenizer.json", "not json"), "its tokenizer does not load as a fast one"),
    ],
)
def test_a_spoilt_directory_is_told_in_one_line(spoil, says, good, tmp_path, capsys):
    folder = shutil.copytree(good, tmp_path / "theirs")
    spoil(folder)
    assert main(["jaxrlhf", "import", f"--from={folder}", f"--workdir={tmp_path / 'run'}"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {folder}")
    assert says in line
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_base_and_a_run_stay_as_they_are(good, tmp_path, capsys):
    argv = ["jaxrlhf", "import", f"--from={good}", f"--workdir={tmp_path / 'run'}"]
    assert main(argv) == 0
    held = {p.name: p.read_bytes() for p in (tmp_path / "run" / "base").iterdir()}
    capsys.readouterr()
    assert main(argv) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run/base: a base is there already; take another --workdir\n"
    assert held == {p.name: p.read_bytes() for p in (tmp_path / "run" / "base").iterdir()}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    assert main([*argv[:-1], f"--workdir={tmp_path / 'begun'}"]) == 2
    assert "a run was begun there already" in capsys.readouterr().err
    assert main([*argv[:2], f"--from={good / SINGLE}", f"--workdir={tmp_path / 'new'}"]) == 2
    assert "is a file; name the directory that it lies in" in capsys.readouterr().err


def test_an_export_says_which_stage_is_missing(good, tmp_path, capsys):
    for workdir in (tmp_path / "nowhere", tmp_path / "imported"):
        if workdir.name == "imported":
            assert main(["jaxrlhf", "import", f"--from={good}", f"--workdir={workdir}"]) == 0
            capsys.readouterr()
        argv = ["jaxrlhf", "export", f"--workdir={workdir}", "--policy=ppo", f"--to={tmp_path / 'out'}"]
        assert main(argv) == 2
        assert capsys.readouterr().err == (
            f"error: {workdir}: no run was begun there; first `jaxrlhf run --config=RECIPE --workdir={workdir}`\n"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["imported"]
