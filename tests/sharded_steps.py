"""One step of every stage on one device and on meshes of eight; `test_sharding.py` runs this and compares."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxrlhf import head as head_room
from jaxrlhf import model, optim, ppo, reward, sampling, sft, sharding
from jaxrlhf.config import Mesh, Optim, Ppo
from jaxrlhf.split import split
from jaxrlhf.types import CHOSEN, REJECTED, ActorCritic, Fixed, PairBatch, PromptBatch, ScalarHead, Scorer, SftBatch

ARCH = model.Architecture(
    vocab_size=48,
    layers=4,
    width=32,
    heads=8,
    kv_heads=8,
    head_width=4,
    ff_width=64,
    max_positions=32,
    **model.FAMILIES["llama"],
)
# A large epsilon, so that rounding in a gradient that should be 0 stays rounding in Adam's step.
TX = optim.optimizer(Optim(lr=0.01, eps=1e-3), 8)
# A prompt of 2 tokens, a chosen response of 2, a rejected one of 1; and a pair of 2, 2 and what a row has left.
PAIR_T = np.repeat(np.float32([1, 1 + CHOSEN, 1 + REJECTED, 2, 2 + CHOSEN, 2 + REJECTED]), (2, 2, 1, 2, 2, 3))
PPO = Ppo(batch_size=16, epochs=2, minibatches=2, kl_target=2.0, entropy_coef=0.01)
# Without an entropy's gradient the head is read in lots; a minibatch of 4 rows has none for some of 8 devices.
PLAIN = Ppo(batch_size=16, epochs=1, minibatches=4)
head_room.LOGITS = 2 * 16 * 48  # two positions of each row at a time, on one device


def named(stage: str, tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{stage}/{jax.tree_util.keystr(p, simple=True, separator='/')}": np.asarray(x) for p, x in leaves}


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    token_BT = rng.integers(2, 48, (16, 12)).astype(np.int32)
    return token_BT, (np.arange(12) < rng.integers(4, 13, (16, 1))).astype(np.float32)


def pairs() -> PairBatch:
    """Two pairs a row where its mask reaches the second's rejected response, else one."""
    token_BT, mask_BT = rows(1)
    length_B = mask_BT.sum(1).astype(np.int32)
    ends_BN2 = np.stack([np.tile([3, 4], (16, 1)), np.stack([np.full(16, 8), length_B - 1], 1)], 1)
    pair_BN = np.stack([length_B > 4, length_B > 9], 1).astype(np.float32)
    return PairBatch(token_BT, mask_BT * PAIR_T, ends_BN2.astype(np.int32), pair_BN)


def held(tree) -> float:
    """The largest share of a tree's bytes that one device holds."""
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim > 1]
    whole = sum(x.nbytes for x in leaves)
    return (
        max(sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == d) for d in jax.devices())
        / whole
    )


def sft_step(mesh: jax.sharding.Mesh, folder: Path, name: str):
    """The compiled step, its program written to a file, and what it takes."""
    frozen, top = (sharding.place(x, mesh) for x in split(model.init(ARCH, jax.random.key(0)), 0.5))
    token_BT, mask_BT = rows(1)
    state = optim.new_state(TX, top, mesh)
    # The last block and the head run on every second position, of each row and so on each device.
    before_BQ = jnp.tile(jnp.arange(0, token_BT.shape[1] - 1, 2, dtype=jnp.int32), (token_BT.shape[0], 1))
    batch = sharding.shard_batch(SftBatch(token_BT, mask_BT, mask_BT * 0.5, before_BQ), mesh)
    compiled = sft.step.lower(ARCH, TX, state, frozen, batch).compile()
    (folder / f"{name}.sft.hlo").write_text(compiled.as_text())
    return compiled, frozen, top, state, batch


def steps(mesh: jax.sharding.Mesh, folder: Path, name: str) -> None:
    compiled, frozen, top, state, batch = sft_step(mesh, folder, name)
    token_BT, mask_BT = rows(1)
    head = ScalarHead(w_D=0.1 * jax.random.normal(jax.random.key(3), (32,), jnp.float32), b=jnp.float32(0.25))
    found = {}

    (folder / f"{name}.json").write_text(json.dumps(held((frozen, state.params, state.opt_state))))
    for _ in range(2):
        state, metrics = compiled(state, frozen, batch)
    found |= named("sft", (metrics, state.params))

    none, everything = (sharding.place(x, mesh) for x in split(model.init(ARCH, jax.random.key(0)), 0.0))
    whole = batch.replace(before_BQ=None)
    state, metrics = sft.step(ARCH, TX, optim.new_state(TX, everything, mesh), none, whole)
    found |= named("sft of all", (metrics, state.params))

    state = optim.new_state(TX, Scorer(top=top, head=head), mesh)
    state, metrics = reward.step(ARCH, TX, state, frozen, sharding.shard_batch(pairs(), mesh))
    found |= named("reward", (metrics, state.params))

    token_BP, mask_BP = rows(2)
    prompts = PromptBatch(token_BP[:, ::-1], mask_BP[:, ::-1], np.arange(16, dtype=np.int32))
    prompts = sharding.shard_batch(prompts, mesh)
    gen, fixed = sampling.Generation(6), Fixed(frozen=frozen, ref=top, scorer=Scorer(top=top, head=head))
    arguments = (frozen, state.params.top, prompts.tokens_BP, prompts.mask_BP, jax.random.key(1))
    compiled = sampling.sample.lower(ARCH, gen, *arguments, 2, True).compile()
    (folder / f"{name}.sample.hlo").write_text(compiled.as_text())
    several = compiled(*arguments)
    found |= named("drawn", several)
    drawn = jax.tree.map(lambda x: x[::2], several)
    state = optim.new_state(TX, ActorCritic(top=state.params.top, value=head), mesh, kl_coef=jnp.float32(0.1))
    rollout, metrics = ppo.score(ARCH, PPO, fixed, state.params, state.kl_coef, prompts, drawn)
    found |= named("rollout", (metrics, rollout))
    state, metrics = ppo.update(ARCH, TX, PPO, state, fixed, rollout, jax.random.key(2))
    found |= named("ppo", (metrics, state.params, state.kl_coef))
    state = optim.new_state(TX, state.params, mesh, kl_coef=jnp.float32(0.1))
    rollout, metrics = ppo.score(ARCH, PLAIN, fixed, state.params, state.kl_coef, prompts, drawn)
    state, learnt = ppo.update(ARCH, TX, PLAIN, state, fixed, rollout, jax.random.key(2))
    found |= named("plain ppo", (metrics, learnt, rollout, state.params))
    np.savez(folder / f"{name}.npz", **found)


if __name__ == "__main__":
    to = Path(sys.argv[1])
    names, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    one = jax.make_mesh((1, 1, 1), names, axis_types=kinds, devices=jax.devices()[:1])
    whole, programs = (json.loads(a) for a in sys.argv[2:])
    for sizes, do in [*((m, steps) for m in [(1, 1, 1), *whole]), *((m, sft_step) for m in programs)]:
        mesh = one if sizes == (1, 1, 1) else sharding.make_mesh(Mesh(*sizes))
        with jax.set_mesh(mesh):
            do(mesh, to, str(tuple(sizes)))
