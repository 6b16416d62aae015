import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_weights import FAMILIES, HF, SPECIAL, assert_same, copy_of

from jaxrlhf import shards, weights
from jaxrlhf.split import pieces, split
from jaxrlhf.types import ScalarHead

LIMIT = 9_000


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_come_back_bit_for_bit_and_none_is_over_the_limit(name, tmp_path):
    arch, params = weights.load(HF / name)
    weights.export(tmp_path, arch, pieces(*split(params, 0.4)), SPECIAL, LIMIT)
    stored = load_file(HF / name / "model.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    found = {}
    for path in files:
        part = load_file(path)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= LIMIT
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[k], stored[k]) for k in stored)
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored.values())
    assert {k: v for p in files for k, v in dict.fromkeys(load_file(p), p.name).items()} == index["weight_map"]
    assert_same(weights.load(tmp_path)[1], params)


def test_transformers_loads_shards(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    arch, params = weights.load(HF / "gpt2")
    weights.export(tmp_path, arch, params, SPECIAL, LIMIT)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (tmp_path, HF / "gpt2"))
    wanted = theirs.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("name", ["gpt_neox", "llama_untied", "opt"])
def test_bf16_stays_bf16(name, tmp_path):
    directory = copy_of(name, tmp_path, {"dtype": "bfloat16"})
    stored = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(directory / shards.SINGLE).items()}
    save_file(stored, directory / shards.SINGLE, {"format": "pt"})
    arch, params = weights.load(directory)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    weights.export(tmp_path / "out", arch, params, SPECIAL)
    assert (tmp_path / "out" / shards.SINGLE).read_bytes() == (directory / shards.SINGLE).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    head = ScalarHead(w_D=np.linspace(-1, 1, arch.width, dtype=np.float32), b=np.float32(0.3))  # pyright: ignore
    weights.export_reward(tmp_path / "reward", arch, params, head, SPECIAL)
    written = load_file(tmp_path / "reward" / shards.SINGLE)
    assert {str(x.dtype) for k, x in written.items() if k != weights.SCORE} == {"bfloat16"}


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a/ü": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "c": np.float32(-2.5).reshape(()),
        "a": rng.normal(size=(2, 3)).astype(np.float32).T,
    }
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, tmp_path / "theirs", {"format": "pt"})
    shards.write(tmp_path / "ours", {k: shards.held(v) for k, v in arrays.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_is_made_when_its_turn_comes_and_let_go_then(tmp_path):
    """A limit below a tensor's size gives that tensor a file of its own."""
    made, alive = [], []

    def tensor(name: str, rows: int) -> shards.Tensor:
        def make() -> np.ndarray:
            made.append(name)
            alive.append(sum(p.stat().st_size > 8 for p in tmp_path.glob("model*")))
            return np.full((rows, 2), 0.5, np.float32)

        return shards.Tensor((rows, 2), np.dtype(np.float32), make)

    shards.write_model(tmp_path, {"a": tensor("a", 2), "b": tensor("b", 9), "c": tensor("c", 1)}, 20)
    assert (made, alive) == (["a", "b", "c"], [0, 1, 2])
    assert [sorted(load_file(p)) for p in sorted(tmp_path.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_an_earlier_model_is_never_read_in_place_of_a_later_one(tmp_path):
    arch, params = weights.load(HF / "opt")
    other = jax.tree.map(lambda x: x - 0.25, params)
    for limit, tree in ((LIMIT, params), (shards.SHARD_BYTES, other), (LIMIT, params)):
        weights.export(tmp_path, arch, tree, SPECIAL, limit)
        assert_same(weights.load(tmp_path)[1], tree)
