"""Batches worked through in parts, and blocks computed again: the same step with less memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import model, optim, sft, sharding
from jaxrlhf.config import Mesh, Optim
from jaxrlhf.files import UserError
from jaxrlhf.split import split
from jaxrlhf.types import SftBatch

ARCH = model.Architecture(
    vocab_size=48,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_width=8,
    ff_width=64,
    max_positions=32,
    **model.FAMILIES["llama"],
)
FROZEN, TOP = split(model.init(ARCH, jax.random.key(0)), 0.5)


def rows(count: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    token_BT = rng.integers(2, 48, (count, 12)).astype(np.int32)
    mask_BT = np.arange(12) < rng.integers(3, 13, (count, 1))
    return jnp.asarray(token_BT), jnp.asarray(mask_BT, jnp.float32)


def sft_batch() -> SftBatch:
    """Weights from 0 to 1.7 and a row without any, so that parts of equal rows weigh very differently."""
    token_BT, mask_BT = rows(6)
    weight_BT = mask_BT * np.random.default_rng(1).uniform(0, 1.7, mask_BT.shape).astype(np.float32)
    return SftBatch(token_BT, mask_BT, weight_BT.at[4].set(0.0))


def near(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def after(step, params, batch, parts):
    # A large epsilon, so that Adam's step is as smooth as the gradient.
    tx = optim.optimizer(Optim(lr=0.5, eps=1.0), 4)
    state, metrics = step(ARCH, tx, optim.new_state(tx, params, sharding.make_mesh(Mesh())), FROZEN, batch, parts)
    return state.params, metrics


@pytest.mark.parametrize("asked", [False, True])
def test_sft_in_parts_is_the_step_of_the_whole_batch(asked):
    """Also where the loss asks for other positions of each row."""
    batch = sft_batch()
    if asked:
        before_BQ = jnp.sort(
            jnp.asarray(np.random.default_rng(2).permuted(np.tile(np.arange(11), (6, 1)), axis=1)[:, :5])
        )
        after_BT = jax.nn.one_hot(before_BQ + 1, 12).sum(1)
        batch = batch.replace(weight_BT=batch.weight_BT * after_BT, before_BQ=before_BQ)
    found, wanted = (after(sft.step, TOP, batch, n) for n in (3, 1))
    near(found, wanted)
    near(wanted, after(sft.step, TOP, batch.replace(before_BQ=None), 1))
    np.testing.assert_allclose(found[1]["tokens"], batch.weight_BT[:, 1:].sum(), rtol=1e-6)


def test_parts_count_by_their_tokens_not_alike():
    batch = sft_batch()
    loss = jax.jit(lambda b: sft.loss(ARCH, FROZEN, TOP, b)[0])
    whole, parts = loss(batch), [loss(jax.tree.map(lambda x, i=i: x[i::2], batch)) for i in range(2)]
    assert abs(float(sum(parts) / 2 - whole)) > 1e-3


def test_a_batch_without_any_weight_has_no_gradient():
    batch = sft_batch()
    batch = batch.replace(weight_BT=jnp.zeros_like(batch.weight_BT))  # pyright: ignore
    loss = lambda top, b: sft.loss(ARCH, FROZEN, top, b)  # noqa: E731
    value, _, grads = optim.gradients(loss, TOP, batch, 3, lambda b: b.weight_BT.sum())
    assert float(value) == 0
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_parts_that_do_not_divide_the_batch_are_an_error_with_numbers():
    with pytest.raises(UserError, match=r"config.sft.batch_size=10 .* x optim.accumulate = 4; 8 or 12 would"):
        sharding.check_divides("config.sft.batch_size", 10, sharding.make_mesh(Mesh()), 4)


def temporary_bytes(remat: str) -> tuple[int, jax.Array]:
    """Of the gradient of a deeper model, where what blocks keep is most of it; and the gradient."""
    arch = replace(ARCH, layers=8, remat=remat)
    frozen, top = split(model.init(arch, jax.random.key(0)), 0.0)
    token_BT, mask_BT = rows(6)
    grad = jax.jit(jax.grad(lambda t: sft.loss(arch, frozen, t, SftBatch(token_BT, mask_BT, mask_BT))[0]))
    compiled = grad.lower(top).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(top)


@pytest.mark.slow
def test_less_kept_is_less_memory_and_the_same_gradient():
    size, wanted = temporary_bytes("none")
    for remat in ("dots", "dots_no_batch", "full"):
        smaller, found = temporary_bytes(remat)
        assert smaller < 0.9 * size
        near(found, wanted)
        size = smaller
