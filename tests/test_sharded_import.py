"""Imports onto eight simulated devices, in a process of their own, since a process's devices are fixed at its start."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxrlhf import model, weights

PROGRAM = """
import json, sys, tracemalloc
from pathlib import Path
import jax, numpy as np
from flax import traverse_util
from jaxrlhf import sharding, shards, weights
from jaxrlhf.config import Mesh

read, sizes = shards.read, []
def counted(path, name):
    array = read(path, name)
    sizes.append(array.nbytes)
    return array
shards.read = counted
meshes = [sharding.make_mesh(Mesh(*axes)) for axes in json.loads(sys.argv[1])]
alone = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1])
found = []
for directory in map(Path, sys.argv[2:]):
    wanted = traverse_util.flatten_dict(weights.load(directory, alone)[1], sep="/")
    for mesh in meshes:
        weights.load(directory, mesh)  # so that what tracing allocates is not counted below
        sizes.clear()
        tracemalloc.start()
        flat = traverse_util.flatten_dict(weights.load(directory, mesh)[1], sep="/")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        ways = {}
        for leaf, x in flat.items():
            assert len(x.addressable_shards) == 8
            assert all(np.array_equal(s.data, np.asarray(wanted[leaf])[s.index]) for s in x.addressable_shards), leaf
            (part,) = {s.data.size for s in x.addressable_shards}
            ways[leaf] = x.size // part
        assert flat.keys() == wanted.keys()
        found.append({"ways": ways, "largest": max(sizes), "reads": len(sizes), "peak": peak})
print(json.dumps(found))
"""
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
MATRICES = ("embed/tokens", "q/kernel", "k/kernel", "v/kernel", "o/kernel", "up/kernel", "down/kernel", "gate/kernel")


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 8), ("opt", 16), ("gpt_neox", 16)])
def test_each_device_gets_its_part_and_the_host_one_tensor_at_a_time(family, kv_heads, tmp_path):
    """LLaMA with grouped queries, and GPT-NeoX with fused ones. A stack of layers is 12 MB and more.

    tracemalloc counts what numpy and safetensors hold on the host, and not XLA's buffers, which are the devices'.
    """
    arch = model.Architecture(
        vocab_size=512, layers=12, width=512, heads=16, kv_heads=kv_heads, head_width=32, ff_width=768,
        max_positions=64, **model.FAMILIES[family],  # pyright: ignore
    )  # fmt: skip
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    weights.export(tmp_path, arch, model.init(arch, jax.random.key(0)), special)
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(MESHES), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for mesh, found in zip(MESHES, json.loads(done.stdout), strict=True):
        split = {leaf: ways for leaf, ways in found["ways"].items() if leaf.endswith(MATRICES)}
        assert len(split) == (8 if family == "llama" else 7)
        assert set(split.values()) == {mesh[1] * mesh[2]}
        assert found["peak"] < 3.5 * found["largest"] < 12 * 512 * 512 * 4
