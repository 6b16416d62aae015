"""Log-probabilities read off a frozen head a few positions at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import losses


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
