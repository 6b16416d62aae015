"""Hand-computed numbers, loops in numpy, and properties. D4, D5, ... are defects of the paper's released code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import losses
from jaxrlhf.config import Ppo

RAGGED_BR = np.float32([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


def draw(seed, shape=RAGGED_BR.shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planted(x, garbage):
    return np.where(RAGGED_BR > 0, x, np.float32(garbage))


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


@partial(jax.jit, static_argnames="c")
def ppo(old_logp, new_logp, advantage, c=None, value=0.0, old_value=0.0, target=0.0, entropy=0.0):
    """`ppo_loss` of one row; scalars are spread over the row."""
    row = jnp.atleast_2d(jnp.float32(new_logp))

    def full(x):
        return jnp.broadcast_to(jnp.float32(x), row.shape)

    arrays = [full(x) for x in (new_logp, value, entropy, old_logp, old_value, advantage, target)]
    return losses.ppo_loss(*arrays, jnp.ones_like(row), c or Ppo(value_coef=0.0))


# Means and whitening.


def test_masked_mean_divides_by_the_real_tokens_not_by_the_padded_size():
    # D5: the released code has (2 + 4 + 9) / 6 = 2.5 here.
    x, mask = jnp.float32([[2, 4, 0], [9, 0, 0]]), jnp.float32([[1, 1, 0], [1, 0, 0]])
    assert float(losses.masked_mean(x, mask)) == 5.0


def test_masked_mean_weighs_by_fractional_masks():
    assert float(losses.masked_mean(jnp.float32([1.0, 4.0, 7.0]), jnp.float32([0.25, 0.25, 0.0]))) == 2.5


def test_an_empty_mask_has_mean_and_gradient_0():
    value, grad = jax.value_and_grad(losses.masked_mean)(jnp.ones((2, 3)), jnp.zeros((2, 3)))
    assert float(value) == 0
    assert not grad.any()
    assert not losses.masked_whiten(jnp.ones((2, 3)), jnp.zeros((2, 3))).any()


def test_whitened_real_tokens_have_mean_0_and_variance_1_and_padding_is_0():
    white = np.asarray(losses.masked_whiten(planted(3 * draw(0) + 7, 1e30), RAGGED_BR))
    real = white[RAGGED_BR > 0]
    close([real.mean(), real.var()], [0, 1])
    assert not white[RAGGED_BR == 0].any()


def test_whitening_without_shift_keeps_the_mean():
    x = 3 * draw(0) + 7
    real = np.asarray(losses.masked_whiten(x, RAGGED_BR, shift_mean=False))[RAGGED_BR > 0]
    close([real.mean(), real.var()], [x[RAGGED_BR > 0].mean(), 1])


def test_whitening_does_not_count_padding():
    # D4: over all six tokens, padding included, the mean is 2/3 and the two real ones become 0.30 and 2.11.
    x, mask = jnp.float32([[1, 3, 0, 0, 0, 0]]), jnp.float32([[1, 1, 0, 0, 0, 0]])
    close(losses.masked_whiten(x, mask), [[-1, 1, 0, 0, 0, 0]])


def test_whitening_a_constant_is_finite():
    close(losses.masked_whiten(jnp.full((2, 3), 5.0), jnp.ones((2, 3))), 0)


# Log-probabilities.


def test_token_logp_and_entropy_at_a_temperature():
    # Logits 2 log 3 and 0 at temperature 2 are odds of 3 to 1.
    logits_BRV = jnp.log(jnp.float32([[[9, 1], [9, 1]]]))
    logp_BR, entropy_BR = losses.token_logp(logits_BRV, jnp.int32([[0, 1]]), 2.0)
    close(logp_BR, np.log([[0.75, 0.25]]))
    close(entropy_BR, np.full((1, 2), -0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_token_logp_of_half_precision_logits_is_computed_in_f32():
    logits_BRV = jnp.asarray(draw(1, (1, 4, 50)), jnp.bfloat16)
    target_BR = jnp.int32([[0, 7, 20, 49]])
    half, full = (losses.token_logp(x, target_BR) for x in (logits_BRV, logits_BRV.astype(jnp.float32)))
    np.testing.assert_array_equal(half[0], full[0])
    assert half[0].dtype == half[1].dtype == jnp.float32


def test_words_that_cannot_be_drawn_leave_entropy_and_gradient_finite():
    def entropy(logits_V):
        return losses.token_logp(logits_V[None, None], jnp.int32([[0]]))[1].sum()

    value, grad = jax.value_and_grad(entropy)(jnp.float32([0, 0, -jnp.inf, -1e38]))
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    close(grad, np.zeros(4))


# Reward losses.


def test_reward_loss_by_hand():
    # Margins log 3, -log 3 and 0: the chosen one wins with probability 3/4, 1/4 and 1/2.
    margin_BN = np.log(np.float32([[3, 1 / 3], [1, 9]]))
    real_BN = jnp.float32([[1, 1], [1, 0]])
    loss, metrics = losses.reward_loss(jnp.float32(margin_BN + 5), jnp.full((2, 2), 5.0), real_BN)
    assert float(loss) == pytest.approx(-np.log([0.75, 0.25, 0.5]).mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == 0.5
    assert float(metrics["margin"]) == pytest.approx(0, abs=1e-6)
    assert set(metrics) == {"loss", "accuracy", "margin"}


def test_ties_count_half():
    _, metrics = losses.reward_loss(jnp.float32([1, 2, 2, 0]), jnp.float32([0, 1, 2, 5]), jnp.ones(4))
    assert float(metrics["accuracy"]) == 2.5 / 4


def test_swapping_the_pair_mirrors_the_reward_loss():
    # -log s(m) + log s(-m) = -m, accuracies add up to 1, gradients have opposite signs.
    a_B, b_B = draw(2, 16), draw(3, 16)
    loss = partial(losses.reward_loss, mask_BN=jnp.ones(16))
    (there, at_there), (back, at_back) = loss(a_B, b_B), loss(b_B, a_B)
    assert float(there - back) == pytest.approx(float((b_B - a_B).mean()), abs=1e-6)
    assert float(at_there["accuracy"] + at_back["accuracy"]) == 1
    grad_a, grad_b = jax.grad(lambda a, b: loss(a, b)[0], (0, 1))(jnp.asarray(a_B), jnp.asarray(b_B))
    close(grad_a, -np.asarray(grad_b))
    assert (np.asarray(grad_a) < 0).all()


def test_extreme_margins_stay_finite():
    loss = partial(lambda chosen, rejected: losses.reward_loss(chosen, rejected, jnp.ones(2))[0])
    value, grad = jax.value_and_grad(loss)(jnp.float32([1e4, -1e4]), jnp.zeros(2))
    assert float(value) == 5000
    close(grad, [0, -0.5])


# KL.


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    logp_V, ref_V = np.float64(jax.nn.log_softmax(draw(4, 9))), np.float64(jax.nn.log_softmax(draw(5, 9)))
    exact = (np.exp(logp_V) * (logp_V - ref_V)).sum()
    estimate = (np.exp(logp_V) * np.asarray(losses.kl(jnp.float32(logp_V), jnp.float32(ref_V), kind))).sum()
    assert exact > 0.3
    assert estimate == pytest.approx(exact, rel=1e-5)


def test_k2_is_biased_but_right_for_near_distributions():
    def ratio(scale):
        logits_V = draw(4, 9)
        logp_V, ref_V = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(logits_V + scale * draw(5, 9))
        exact = (jnp.exp(logp_V) * (logp_V - ref_V)).sum()
        return float((jnp.exp(logp_V) * losses.kl(logp_V, ref_V, "k2")).sum() / exact)

    assert ratio(0.02) == pytest.approx(1, abs=0.03)
    assert abs(ratio(2.0) - 1) > 0.1


def test_kl_by_hand():
    logp, ref = jnp.float32([[-1.0, -3.0]]), jnp.float32([[-2.0, -1.0]])
    close(losses.kl(logp, ref, "k1"), [[1, -2]])
    close(losses.kl(logp, ref, "k2"), [[0.5, 2]])
    close(losses.kl(logp, ref, "k3"), [[np.exp(-1), np.exp(2) - 3]])


def test_k3_is_not_negative_and_precise_near_0():
    d = np.float32([-1e-3, 1e-3, 3, -3, 0])
    k3 = np.asarray(losses.kl(jnp.asarray(d), jnp.zeros(5), "k3"))
    assert (k3 >= 0).all()
    np.testing.assert_allclose(k3[:2], [5e-7, 5e-7], rtol=1e-2)


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="k4"):
        losses.kl(jnp.zeros(1), jnp.zeros(1), "k4")


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(6.0, 0.2), (6.6, 0.2 * (1 + 0.1 * 0.05)), (60.0, 0.2 * (1 + 0.2 * 0.05)), (0.0, 0.2 * (1 - 0.2 * 0.05))],
)
def test_adaptive_coefficient(observed, expected):
    coef = losses.adapt_kl_coef(jnp.float32(0.2), jnp.float32(observed), target=6.0, horizon=10_000, n=500)
    assert float(coef) == pytest.approx(expected, rel=1e-6)


# Scores and token rewards.


def shape_scores(**changes):
    score_B, length_B = jnp.float32([-0.5, 2.25, 1.0]), jnp.float32([10, 5, 10])
    return losses.score_penalties(score_B, length_B, jnp.array([True, True, False]), Ppo(**changes), max_length=10)


def test_scores_are_untouched_by_default():
    close(shape_scores(), [-0.5, 2.25, 1.0])


def test_score_penalties():
    close(shape_scores(length_penalty=0.32), [-0.82, 2.24, 0.68])
    close(shape_scores(eos_bonus=0.1), [-0.4, 2.35, 1.0])
    close(shape_scores(eos_required=True), [-0.5, 2.25, -1])
    close(shape_scores(eos_required=True, eos_missing=-3.5, length_penalty=0.32, eos_bonus=1.0), [0.18, 3.24, -3.5])


def test_the_score_falls_on_the_last_real_token():
    # Fractional and negative scores survive; D7, D12: no penalty and no score on padding, no wrap-around to index -1.
    kl_BR = planted(np.full(RAGGED_BR.shape, 2.0), 1e6)
    reward_BR = losses.token_rewards(jnp.float32([0.75, -1.5, 3.0, 9.0]), kl_BR, RAGGED_BR, 0.1)
    expected = [[-0.2, -0.2, -0.2, -0.2, 0.55], [-0.2, -1.7, 0, 0, 0], [2.8, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    close(reward_BR, expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_rows_rewards_add_up_to_its_score_less_its_kl(seed):
    kl_BR, score_B = draw(seed), draw(seed + 10, 4)
    total_B = np.asarray(losses.token_rewards(score_B, kl_BR, RAGGED_BR, jnp.float32(0.3))).sum(-1)
    close(total_B[:3], (score_B - 0.3 * (kl_BR * RAGGED_BR).sum(-1))[:3])


# Advantages.


def test_gae_by_hand():
    # gamma 1/2, lam 1/2. Row 0: delta_2 = 4 - 2 = 2; delta_1 = 0 + 1 - 2 = -1; delta_0 = 1 + 1 - 4 = -2.
    # A_2 = 2; A_1 = -1 + 2/4 = -1/2; A_0 = -2 - 1/8. Row 1 ends at its second token:
    # delta_1 = -3.5 - 2 = -5.5; delta_0 = 1 + 1 - 4 = -2; A_0 = -2 - 5.5/4 = -3.375.
    reward_BR = jnp.float32([[1, 0, 4], [1, -3.5, 99]])
    value_BR = jnp.float32([[4, 2, 2], [4, 2, 77]])
    mask_BR = jnp.float32([[1, 1, 1], [1, 1, 0]])
    advantage_BR, return_BR = losses.gae(reward_BR, value_BR, mask_BR, 0.5, 0.5)
    close(advantage_BR, [[-2.125, -0.5, 2], [-3.375, -5.5, 0]])
    close(return_BR, [[1.875, 1.5, 4], [0.625, -3.5, 0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0)])
def test_gae_equals_a_loop_over_unpadded_rows(gamma, lam):
    reward_BR, value_BR = draw(6), draw(7)
    advantage_BR, return_BR = losses.gae(planted(reward_BR, 1e30), planted(value_BR, -1e30), RAGGED_BR, gamma, lam)
    expected = np.zeros(RAGGED_BR.shape)
    for b, length in enumerate(RAGGED_BR.sum(-1).astype(int)):
        later = next_value = 0.0
        for t in reversed(range(length)):
            delta = reward_BR[b, t] + gamma * next_value - value_BR[b, t]
            later = expected[b, t] = delta + gamma * lam * later
            next_value = value_BR[b, t]
    close(advantage_BR, expected)
    close(return_BR, expected + value_BR * RAGGED_BR)


def test_with_lambda_1_the_returns_are_the_discounted_rewards_to_come():
    reward_BR = jnp.float32([[0.5, -2, 8, 1000]])
    _, return_BR = losses.gae(reward_BR, jnp.float32([[3, 1, 4, 1]]), jnp.float32([[1, 1, 1, 0]]), 0.5, 1.0)
    close(return_BR, [[1.5, 2, 8, 0]])


def test_advantages_do_not_change_with_the_amount_of_padding():
    wide = np.pad(RAGGED_BR, ((0, 0), (0, 3)))
    short = losses.gae(draw(6), draw(7), RAGGED_BR, 0.9, 0.95)
    long = losses.gae(*(np.pad(draw(s), ((0, 0), (0, 3)), constant_values=5.0) for s in (6, 7)), wide, 0.9, 0.95)
    np.testing.assert_array_equal(short, np.stack(long)[:, :, :5])


# PPO.


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logp_BR, advantage_BR = draw(8), draw(9)

    def loss(logp_BR):
        zeros = jnp.zeros_like(logp_BR)
        return losses.ppo_loss(
            logp_BR, zeros, zeros, jnp.asarray(draw(8)), zeros, jnp.asarray(advantage_BR), zeros, RAGGED_BR, Ppo()
        )

    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logp_BR))
    close(grad, -advantage_BR * RAGGED_BR / RAGGED_BR.sum())
    assert float(value) == pytest.approx(-(advantage_BR * RAGGED_BR).sum() / RAGGED_BR.sum(), rel=1e-5)
    assert float(metrics["ratio"]) == 1
    assert float(metrics["clip_fraction"]) == float(metrics["approx_kl"]) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 2.0, -2.4, True),  # no reward for going beyond 1.2
        (0.5, 2.0, -1.0, False),  # the way back stays open
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
    ],
)
def test_policy_clipping(ratio, advantage, loss, clipped):
    def run(logp):
        return ppo(-1.0, logp, advantage)

    (value, metrics), grad = jax.value_and_grad(run, has_aux=True)(jnp.float32(np.log(ratio) - 1))
    assert float(value) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["clip_fraction"]) == clipped
    assert float(metrics["ratio"]) == pytest.approx(ratio, rel=1e-5)
    assert float(grad) == (0 if clipped else pytest.approx(-advantage * ratio, rel=1e-5))


@pytest.mark.parametrize(
    ("value", "target", "loss", "clipped", "slope"),
    [
        (1.5, 2.0, 0.5 * 0.8**2, True, 0.0),  # clipped to 1.2, which is further from the target
        (1.5, 0.0, 0.5 * 1.5**2, False, 1.5),
        (0.5, 0.0, 0.5 * 0.8**2, True, 0.0),
        (0.5, 2.0, 0.5 * 1.5**2, False, -1.5),
        (1.1, 2.0, 0.5 * 0.9**2, False, -0.9),
    ],
)
def test_value_clipping_around_the_old_value_of_1(value, target, loss, clipped, slope):
    def run(value):
        return ppo(0.0, 0.0, 0.0, Ppo(value_coef=1.0, value_clip=0.2), value=value, old_value=1.0, target=target)

    (total, metrics), grad = jax.value_and_grad(run, has_aux=True)(jnp.float32(value))
    assert float(total) == float(metrics["value_loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["value_clip_fraction"]) == clipped
    assert float(grad) == pytest.approx(slope, rel=1e-5)


def test_the_total_adds_up_and_the_metrics_are_flat():
    c = Ppo(value_coef=0.5, entropy_coef=0.25)
    loss, m = ppo([-1.0, -2.0], [-0.9, -2.3], 0.7, c, value=0.3, old_value=0.2, target=1.0, entropy=[1.0, 3.0])
    assert set(m) == {
        "policy_loss", "value_loss", "entropy", "ratio", "clip_fraction", "value_clip_fraction", "approx_kl",
    }  # fmt: skip
    assert float(m["entropy"]) == 2
    assert float(loss) == pytest.approx(float(m["policy_loss"] + 0.5 * m["value_loss"] - 0.25 * 2.0), rel=1e-6)
    d = np.array([0.1, -0.3])
    assert float(m["approx_kl"]) == pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-4)


def test_approx_kl_is_unbiased_for_the_kl_of_old_to_new():
    old_V, new_V = np.float64(jax.nn.log_softmax(draw(4, 9))), np.float64(jax.nn.log_softmax(draw(5, 9)))
    each = [float(ppo(o, n, 0.0)[1]["approx_kl"]) for o, n in zip(old_V, new_V, strict=True)]
    assert np.exp(old_V) @ each == pytest.approx((np.exp(old_V) * (old_V - new_V)).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [([1, 2, 3, 9], [1, 2, 3, -9], 1.0), ([1, 2, 3, 9], [2, 2, 2, 0], 0.0), ([1, 2, 3, 9], [3, 2, 1, 0], -3.0),
     ([1, 2, 3, 9], [11, 12, 13, 0], 1.0), ([5, 5, 5, 9], [1, 2, 3, 0], 0.0)],
)  # fmt: skip
def test_explained_variance(target, value, expected):
    mask = jnp.float32([1, 1, 1, 0])
    assert float(losses.explained_variance(jnp.float32(value), jnp.float32(target), mask)) == pytest.approx(expected)
