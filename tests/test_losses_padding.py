"""What holds of every function of `losses`: padding does not leak, results are f32, jit changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import losses
from jaxrlhf.config import Ppo

RAGGED_BR = np.float32([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
GARBAGE = (np.nan, np.inf, -np.inf, 1e38, -1e38)
NAMES = ["logp", "value", "entropy", "old_logp", "old_value", "advantage", "return"]


def draw(seed, shape=RAGGED_BR.shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(x, garbage):
    return np.where(RAGGED_BR > 0, x, np.float32(garbage))


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def ppo(arrays):
    return losses.ppo_loss(*(arrays[n] for n in NAMES), jnp.asarray(RAGGED_BR), Ppo(entropy_coef=0.1))


@pytest.mark.parametrize("name", NAMES)
def test_garbage_in_padding_changes_neither_ppo_loss_nor_gradients(name):
    clean = {n: draw(i + 20) for i, n in enumerate(NAMES)}
    expected = ppo(clean)
    for garbage in GARBAGE:
        jax.tree.map(np.testing.assert_array_equal, ppo(clean | {name: planted(clean[name], garbage)}), expected)
    grads = {n: np.asarray(g) for n, g in expected[1].items()}
    assert all(not g[RAGGED_BR == 0].any() and g[RAGGED_BR > 0].any() for g in grads.values())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: losses.masked_mean(x, RAGGED_BR),
        lambda x: losses.masked_whiten(x, RAGGED_BR) * draw(30),
        lambda x: losses.masked_whiten(x, RAGGED_BR, shift_mean=False) * draw(30),
        lambda x: losses.token_rewards(draw(31, 4), x, RAGGED_BR, 0.1),
        lambda x: losses.gae(x, draw(33), RAGGED_BR, 0.9, 0.9)[0],
        lambda x: losses.gae(draw(34), x, RAGGED_BR, 0.9, 0.9)[1] * draw(30),
        lambda x: losses.explained_variance(x, draw(35), RAGGED_BR),
        lambda x: losses.explained_variance(draw(36), x, RAGGED_BR),
        lambda x: losses.reward_loss(x, draw(40), RAGGED_BR)[0],
        lambda x: losses.dpo_loss(draw(40), x, draw(41), draw(42), RAGGED_BR, 0.3, "ipo")[0],
    ],
    ids=[
        "mean",
        "whiten",
        "scale",
        "rewards",
        "advantage",
        "return",
        "explained_value",
        "explained_return",
        "reward",
        "ipo",
    ],
)
def test_garbage_in_padding_leaks_nowhere(function):
    evaluate = jax.jit(jax.value_and_grad(lambda x: function(x).sum()))
    x = draw(37)
    expected = evaluate(x)
    assert np.isfinite(expected[1]).all()
    assert np.asarray(expected[1])[RAGGED_BR > 0].any()
    for garbage in GARBAGE:
        jax.tree.map(np.testing.assert_array_equal, evaluate(planted(x, garbage)), expected)


def every_function(x_BR, mask_BR):
    score_B = x_BR[:, 0]
    return {
        "mean": losses.masked_mean(x_BR, mask_BR),
        "whiten": losses.masked_whiten(x_BR, mask_BR),
        "scale": losses.masked_whiten(x_BR, mask_BR, shift_mean=False),
        "reward": losses.reward_loss(score_B, -score_B, mask_BR[:, 0]),
        "kl": [losses.kl(x_BR, 2 * x_BR, kind) for kind in ("k1", "k2", "k3")],
        "coef": losses.adapt_kl_coef(score_B[0], score_B[1], 6.0, 10_000, 64),
        "penalties": losses.score_penalties(score_B, mask_BR.sum(-1), score_B > 0, Ppo(eos_required=True), 5),
        "rewards": losses.token_rewards(score_B, x_BR, mask_BR, score_B[0]),
        "gae": losses.gae(x_BR, 2 * x_BR, mask_BR, 0.9, 0.95),
        "ppo": losses.ppo_loss(*[(1 + i / 10) * x_BR for i in range(7)], mask_BR, Ppo(entropy_coef=0.1)),
        "explained": losses.explained_variance(x_BR, 2 * x_BR, mask_BR),
        "logp": losses.token_logp(jnp.stack([x_BR, -x_BR], -1), jnp.zeros(x_BR.shape, jnp.int32), 0.7),
    }


@pytest.mark.parametrize("x_type", ["float64", "float32", "float16"])
@pytest.mark.parametrize("mask_type", ["float64", "float32", "int32", "bool"])
def test_results_are_f32_whatever_comes_in(x_type, mask_type):
    with jax.enable_x64(True):  # without it jax turns f64 into f32 on the way in
        x_BR, mask_BR = jnp.asarray(draw(38), x_type), jnp.asarray(RAGGED_BR, mask_type)
        assert x_BR.dtype == x_type
        shapes = jax.eval_shape(every_function, x_BR, mask_BR)
    wrong = {jax.tree_util.keystr(k): v.dtype for k, v in jax.tree.leaves_with_path(shapes) if v.dtype != np.float32}
    assert not wrong


def test_everything_is_the_same_under_jit():
    args = jnp.asarray(draw(39)), jnp.asarray(RAGGED_BR)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jax.jit(every_function)(*args),
                 every_function(*args))  # fmt: skip
