"""Eight simulated devices in a process of their own, since a process's devices are fixed at its start."""

import json
import os
import subprocess
import sys

import pytest
from jax.sharding import PartitionSpec as P

from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError
from jaxrlhf.sharding import check_divides, make_mesh, spec

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jaxrlhf import model, optim, sampling, sft, sharding
from jaxrlhf.config import Mesh, Optim
from jaxrlhf.split import split
from jaxrlhf.types import SftBatch

mesh = sharding.make_mesh(Mesh(*json.loads(sys.argv[1])))
arch = model.Architecture(vocab_size=48, layers=4, width=32, heads=8, kv_heads=8, head_width=4, ff_width=64,
                          max_positions=32, **model.FAMILIES["llama"])
frozen, top = split(model.init(arch, jax.random.key(0)), 0.5)
frozen, top = sharding.place(frozen, mesh), sharding.place(top, mesh)
rng = np.random.default_rng(0)
tokens = rng.integers(2, 48, (16, 12)).astype(np.int32)
mask = (np.arange(12) < rng.integers(4, 13, (16, 1))).astype(np.float32)
batch = sharding.shard_batch(SftBatch(tokens, mask, mask), mesh)
tx = optim.optimizer(Optim(lr=0.01), 3)
state = optim.new_state(tx, top, mesh)
losses = []
for _ in range(3):
    state, metrics = sft.step(arch, tx, state, frozen, batch)
    losses.append(float(metrics["loss"]))
prompts = sharding.shard_batch((tokens, jnp.ones((16, 12), jnp.float32)), mesh)
drawn = sampling.sample(arch, sampling.Generation(5), frozen, state.params, *prompts, jax.random.key(1), 2)
total = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))
print(json.dumps({"losses": losses, "params": total, "tokens": np.asarray(drawn.tokens_BR).tolist()}))
"""


def run(mesh: tuple[int, int, int], devices: int) -> dict:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(mesh)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_sharded_equals_unsharded():
    one = run((1, 1, 1), 1)
    for mesh in [(8, 1, 1), (2, 2, 2)]:
        many = run(mesh, 8)
        assert many["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert many["params"] == pytest.approx(one["params"], rel=1e-5)
        assert many["tokens"] == one["tokens"]


def test_a_mesh_that_does_not_fit_is_an_error_with_numbers():
    with pytest.raises(UserError, match="= 3, but there are 1 devices"):
        make_mesh(Mesh(data=3))
    with pytest.raises(UserError, match="one at most -1"):
        make_mesh(Mesh(data=-1, fsdp=-1))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule"):
        spec("blocks/q/kernle", (2, 4, 4, 4), make_mesh(Mesh()))


def test_members_of_an_ensemble_lie_as_one_model_does():
    mesh = make_mesh(Mesh())
    assert spec("members/top/blocks/q/kernel", (3, 2, 4, 4, 4), mesh) == P(None, None, "fsdp", "tensor", None)
    assert spec("members/top/embed/tokens", (3, 8, 4), mesh) == P(None, "tensor", "fsdp")
    assert spec("members/head/w_D", (3, 4), mesh) == spec("head/w_D", (4,), mesh) == P()


def test_every_batch_divides_over_one_device():
    check_divides("config.sft.batch_size", 7, make_mesh(Mesh()))
