"""Log-probabilities read off a frozen head a few positions at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import losses, model, rollouts
from jaxrlhf.split import split


@pytest.mark.parametrize("most", [1, 2 * 3 * 7, 2**24])
def test_a_frozen_head_read_in_parts_equals_the_whole(most):
    """One, three (which does not divide the five) and all positions at a time: values and gradients."""
    rng = np.random.default_rng(0)
    final_BRD, head_DV, cotangent_BR = (
        jnp.asarray(rng.normal(0, s, shape), jnp.float32) for s, shape in ((1, (2, 5, 4)), (2, (4, 7)), (1, (2, 5)))
    )
    target_BR = jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32)
    logits = lambda x: 3 * jnp.tanh(x @ head_DV / 3)  # noqa: E731

    def whole(final_BRD):
        return losses.token_logp(logits(final_BRD), target_BR, 0.7)

    def in_parts(final_BRD):
        return losses.head_logp(logits, final_BRD, target_BR, 0.7, most)

    (wanted_BR, entropy_BR), pull = jax.vjp(whole, final_BRD)
    (found_BR, found_entropy_BR), pull_found = jax.vjp(in_parts, final_BRD)
    assert np.allclose(found_BR, wanted_BR, atol=1e-6)
    assert np.allclose(found_entropy_BR, entropy_BR, atol=1e-6)
    wanted_BRD = pull((cotangent_BR, jnp.zeros((2, 5))))[0]
    assert np.abs(wanted_BRD).max() > 0.1
    assert np.allclose(pull_found((cotangent_BR, jnp.ones((2, 5))))[0], wanted_BRD, atol=1e-5)


def test_a_head_that_is_trained_cannot_be_read_as_a_frozen_one():
    def total(head_DV):
        return losses.head_logp(lambda x: x @ head_DV, jnp.ones((1, 2, 3)), jnp.int32([[0, 1]]))[0].sum()

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(total)(jnp.ones((3, 4)))


@pytest.mark.parametrize("freeze_layers", [0.5, 0.0])
def test_a_rollout_is_read_as_by_its_logits_whoever_owns_the_head(freeze_layers):
    """Values, entropies and gradients of TOP; with `entropy_gradient`, the entropy's too."""
    arch = model.Architecture(
        **model.FAMILIES["llama"],
        vocab_size=13, layers=2, width=8, heads=2, kv_heads=1, head_width=4, ff_width=12, max_positions=16,
    )  # fmt: skip
    rng, R = np.random.default_rng(1), 3
    shapes = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.35, x.shape), jnp.float32), shapes)
    frozen, top = split(params, freeze_layers)
    token_BT = jnp.asarray(rng.integers(0, 13, (2, 7)), jnp.int32)
    mask_BT = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], jnp.float32)
    weight_BR, other_BR = (jnp.asarray(rng.normal(size=(2, R)), jnp.float32) for _ in range(2))

    def total(top, read):
        hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
        logp_BR, entropy_BR = read(top, hidden_BTD)
        return (logp_BR * weight_BR + entropy_BR * other_BR).sum()

    def plain(top, hidden_BTD):
        final_BTD = model.run_top(arch, top, token_BT, hidden_BTD, mask_BT)
        logits_BTV = model.logits(arch, frozen, top, final_BTD)
        return losses.token_logp(logits_BTV[:, -R - 1 : -1], token_BT[:, -R:], 0.7)

    def ours(top, hidden_BTD, entropy_gradient):
        final_BRD = rollouts.final_states(arch, top, token_BT, hidden_BTD, mask_BT, R)
        return rollouts.read(arch, frozen, top, final_BRD, token_BT, 0.7, entropy_gradient)

    def without(top, hidden_BTD):
        logp_BR, entropy_BR = plain(top, hidden_BTD)
        return logp_BR, jax.lax.stop_gradient(entropy_BR)

    for found, wanted in (
        (lambda *x: ours(*x, True), plain),
        (lambda *x: ours(*x, False), without if freeze_layers else plain),
    ):
        (a, a_grads), (b, b_grads) = (
            jax.jit(jax.value_and_grad(total), static_argnums=1)(top, r) for r in (found, wanted)
        )
        assert np.allclose(a, b, atol=1e-5)
        for x, y in zip(jax.tree.leaves(a_grads), jax.tree.leaves(b_grads), strict=True):
            assert np.allclose(x, y, atol=1e-5)
