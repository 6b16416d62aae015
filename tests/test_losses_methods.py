"""Losses of DPO, RLOO, GRPO, forward KL and ensembles: numbers by hand, loops in numpy, and properties."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import losses
from jaxrlhf.config import Grpo

RAGGED_BR = np.float32([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
GARBAGE = (np.nan, np.inf, -np.inf, 1e38)


def draw(seed, shape=RAGGED_BR.shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


# DPO.


def dpo(kind, beta=0.5):
    # Log-ratios to the reference: chosen 0.5 and -1.5, rejected -0.5 and 0.25; so h = 1 and -1.75.
    return losses.dpo_loss(
        jnp.float32([-3.0, -7.5, 9.0]),
        jnp.float32([-4.5, -2.0, 1.0]),
        jnp.float32([-3.5, -6.0, 0.0]),
        jnp.float32([-4.0, -2.25, 0.0]),
        jnp.float32([1, 1, 0]),
        beta,
        kind,
    )


def test_dpo_by_hand():
    loss, m = dpo("sigmoid")
    assert float(loss) == pytest.approx((np.log1p(np.exp(-0.5)) + np.log1p(np.exp(0.875))) / 2, rel=1e-6)
    assert float(m["accuracy"]) == 0.5
    assert float(m["margin"]) == pytest.approx(0.5 * (1 - 1.75) / 2)
    assert float(m["chosen_reward"]) == pytest.approx(0.5 * (0.5 - 1.5) / 2)
    assert float(m["rejected_reward"]) == pytest.approx(0.5 * (-0.5 + 0.25) / 2)


def test_ipo_by_hand():
    # 1 / (2 tau) = 1: ((1 - 1)^2 + (-1.75 - 1)^2) / 2.
    loss, m = dpo("ipo")
    assert float(loss) == float(m["loss"]) == pytest.approx(2.75**2 / 2, rel=1e-6)
    assert float(m["margin"]) == pytest.approx(-0.1875)
    with pytest.raises(ValueError, match="sigmoid, ipo"):
        dpo("hinge")


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_gradient_of_dpo_by_finite_differences(kind):
    with jax.enable_x64(True):
        rows = [jnp.asarray(np.random.default_rng(s).normal(size=5)) for s in range(4)]
        grads = jax.grad(lambda x: losses.dpo_loss(*x, jnp.ones(5), 0.3, kind)[0])(rows)
        h = 1e-2
        for i, b in [(0, 1), (1, 3), (2, 0), (3, 4)]:
            ends = [[r.at[b].add(s * h) if j == i else r for j, r in enumerate(rows)] for s in (1, -1)]
            up, down = (float(losses.dpo_loss(*x, jnp.ones(5), 0.3, kind)[0]) for x in ends)
            assert float(grads[i][b]) == pytest.approx((up - down) / (2 * h), rel=1e-2, abs=1e-4)


def test_dpo_starts_at_log_2_with_the_gradient_of_beta_over_2():
    ref = [jnp.float32([-3.0, -1.5]), jnp.float32([-2.0, -8.25])]
    value, grad = jax.value_and_grad(lambda c: losses.dpo_loss(c, ref[1], *ref, jnp.ones(2), 0.3, "sigmoid")[0])(ref[0])
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    close(grad, [-0.3 / 2 / 2] * 2)


def test_what_prompts_weigh_cancels_in_dpo():
    rows = [jnp.asarray(draw(s, 5)) for s in range(4)]
    shifted = [r + jnp.asarray(draw(9, 5)) for r in rows]  # both sides follow one prompt
    found = [losses.dpo_loss(*x, jnp.ones(5), 0.3, "ipo")[0] for x in (shifted, rows)]
    close(*found)


# Ensembles.


def test_combinations_by_hand():
    score_EB = jnp.float32([[1.0, -2.0], [2.5, -2.0], [-0.5, -2.0]])
    close(losses.combine_scores(score_EB, "mean", 9.0), [1, -2])
    close(losses.combine_scores(score_EB, "worst", 9.0), [-0.5, -2])
    # Variance over members: (0 + 1.5^2 + 1.5^2) / 3 = 1.5.
    close(losses.combine_scores(score_EB, "uncertainty", 0.5), [1 - 0.75, -2])
    with pytest.raises(ValueError, match="mean, worst, uncertainty"):
        losses.combine_scores(score_EB, "median", 0.5)


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty"])
def test_members_of_one_mind_are_one_reward_model(how):
    score_B = jnp.asarray(draw(1, 6))
    close(losses.combine_scores(jnp.stack([score_B] * 4), how, 0.7), score_B, 1e-6)


# Advantages.


def test_leave_one_out_by_hand():
    # Others' means of row 0: (-1 + 4.5) / 2, (2 + 4.5) / 2, (2 - 1) / 2.
    advantage_BN = losses.leave_one_out(jnp.float32([[2, -1, 4.5], [-0.5, -0.5, -0.5]]))
    close(advantage_BN, [[0.25, -4.25, 4.0], [0, 0, 0]])


def test_with_two_responses_each_is_the_others_baseline():
    return_BN = draw(2, (7, 2))
    difference_B = return_BN[:, 0] - return_BN[:, 1]
    close(losses.leave_one_out(return_BN), np.stack([difference_B, -difference_B], 1))


def test_the_leave_one_out_gradient_is_unbiased():
    """The mean over all pairs of draws, weighed by their probability, is the gradient of the expected reward."""
    logits_V, reward_V = jnp.asarray(draw(3, 4)), draw(4, 4)
    expected = jax.grad(lambda x: jax.nn.softmax(x) @ reward_V)(logits_V)
    found = np.zeros(4)
    p_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
    for i, j in np.ndindex(4, 4):
        advantage_B = losses.leave_one_out(jnp.float32([[reward_V[i], reward_V[j]]]))[0]

        def loss(x, advantage_B=advantage_B, i=i, j=j):
            logp_BR = jax.nn.log_softmax(x)[jnp.array([[i], [j]])]
            return losses.rloo_loss(logp_BR, advantage_B, jnp.ones((2, 1)))[0]

        found -= p_V[i] * p_V[j] * np.asarray(jax.grad(loss)(logits_V))
    close(found, expected)


def test_rloo_weighs_whole_responses():
    logp_BR, advantage_B = draw(5), np.float32([0.5, -2.0, 1.25, 3.0])
    value, grad = jax.value_and_grad(lambda x: losses.rloo_loss(x, advantage_B, RAGGED_BR)[0])(jnp.asarray(logp_BR))
    assert float(value) == pytest.approx(-(advantage_B * (logp_BR * RAGGED_BR).sum(1)).mean(), rel=1e-5)
    close(grad, -advantage_B[:, None] * RAGGED_BR / 4)


def test_group_advantages_by_hand():
    # Mean 1, standard deviation sqrt((1 + 4 + 9) / 3).
    advantage_BN = losses.group_advantages(jnp.float32([[0, -1, 4], [2.5, 2.5, 2.5]]))
    close(advantage_BN, [np.array([-1, -2, 3]) / (np.sqrt(14 / 3) + 1e-4), [0, 0, 0]])
    close(losses.group_advantages(jnp.float32([[0, -1, 4]]), divide=False), [[-1, -2, 3]])


# GRPO.


def grpo_by_loop(logp_BR, old_BR, ref_BR, advantage_B, c):
    total = 0.0
    for b, length in enumerate(RAGGED_BR.sum(1).astype(int)):
        row = 0.0
        for t in range(length):
            ratio = np.exp(logp_BR[b, t] - old_BR[b, t])
            gain = min(ratio * advantage_B[b], np.clip(ratio, 1 - c.clip, 1 + c.clip) * advantage_B[b])
            inverse = np.exp(ref_BR[b, t] - logp_BR[b, t])
            row += gain - c.kl_coef * (inverse - np.log(inverse) - 1)
        total += row / (RAGGED_BR.shape[1] if c.unbiased else max(length, 1))
    return -total / len(RAGGED_BR)


@pytest.mark.parametrize("c", [Grpo(clip=0.3), Grpo(clip=0.1, kl_coef=0.7), Grpo(unbiased=True), Grpo(kl_coef=0.0)])
def test_grpo_equals_a_loop_over_unpadded_rows(c):
    arrays = [0.4 * draw(s) - 1 for s in (6, 7, 8)]
    advantage_B = np.float32([0.75, -1.5, 2.0, 5.0])
    loss, m = losses.grpo_loss(*arrays, advantage_B, RAGGED_BR, c)
    close(loss, grpo_by_loop(*arrays, advantage_B, c))
    assert 0 < float(m["clip_fraction"]) < 1


@pytest.mark.parametrize("unbiased", [False, True])
def test_at_ratio_1_grpo_is_the_policy_gradient_of_its_group(unbiased):
    score_BN = np.float32([[0.5, -1.25, 2.0, 0.25]])
    advantage_B = losses.group_advantages(score_BN, divide=not unbiased)[0]
    logp_BR, c = jnp.asarray(draw(9)), Grpo(kl_coef=0.0, unbiased=unbiased)

    def loss(x):
        return losses.grpo_loss(x, logp_BR, jnp.asarray(draw(10)), advantage_B, RAGGED_BR, c)

    (_, m), grad = jax.value_and_grad(loss, has_aux=True)(logp_BR)
    share_B1 = 5.0 if unbiased else np.maximum(RAGGED_BR.sum(1, keepdims=True), 1)
    close(grad, -np.asarray(advantage_B)[:, None] * RAGGED_BR / share_B1 / 4)
    assert float(m["approx_kl"]) == 0
    assert float(m["ratio"]) == 1


def test_without_advantages_grpo_pulls_to_the_reference():
    c, logp_BR, ref_BR = Grpo(kl_coef=0.5), jnp.asarray(0.3 * draw(11) - 2), 0.3 * draw(12) - 2
    loss = lambda x: losses.grpo_loss(x, logp_BR, jnp.asarray(ref_BR), jnp.zeros(4), RAGGED_BR, c)  # noqa: E731
    (value, m), grad = jax.value_and_grad(loss, has_aux=True)(logp_BR)
    d_BR = np.asarray(logp_BR) - ref_BR
    per_row = ((np.exp(-d_BR) - 1 + d_BR) * RAGGED_BR).sum(1) / np.maximum(RAGGED_BR.sum(1), 1)
    close(value, 0.5 * per_row.mean())
    assert (np.sign(grad) == np.sign(d_BR) * RAGGED_BR).all()
    close(m["ref_kl"], ((np.exp(-d_BR) - 1 + d_BR) * RAGGED_BR).sum() / RAGGED_BR.sum())


# Forward KL.


def test_forward_kl_is_the_sum_over_the_vocabulary():
    ref_BV, own_BV, temperature = draw(13, (3, 7)), draw(14, (3, 7)), 0.7

    def softmax(x):
        p = np.exp(np.float64(x) / temperature)
        return p / p.sum(-1, keepdims=True)

    p, q = softmax(ref_BV), softmax(own_BV)
    close(losses.forward_kl(ref_BV, own_BV, temperature), (p * np.log(p / q)).sum(-1))
    grad = jax.grad(lambda x: losses.forward_kl(ref_BV, x, temperature).sum())(jnp.asarray(own_BV))
    close(grad, (q - p) / temperature)


def test_forward_kl_is_0_at_equality_with_no_gradient():
    logits_BV = jnp.asarray(draw(15, (3, 7)))
    value, grad = jax.value_and_grad(lambda x: losses.forward_kl(logits_BV, x).sum())(logits_BV + 2.5)
    close(value, 0)
    close(grad, 0, 1e-6)
    close(jax.grad(lambda x: losses.forward_kl(x, 2 * logits_BV).sum())(logits_BV), 0)  # the reference learns nothing


def test_words_that_cannot_be_drawn_add_nothing_to_forward_kl():
    ref_V, own_V = jnp.float32([0.5, -jnp.inf, 1.0]), jnp.float32([1.5, -jnp.inf, -0.25])
    value, grad = jax.value_and_grad(lambda x: losses.forward_kl(ref_V, x))(own_V)
    close(value, losses.forward_kl(ref_V[jnp.array([0, 2])], own_V[jnp.array([0, 2])]))
    assert np.isfinite(grad).all()
    # Where only the policy cannot draw a word that the reference can, no finite number is right.
    assert np.isinf(losses.forward_kl(jnp.zeros(2), jnp.float32([0.0, -jnp.inf])))


# Padding, types.


@pytest.mark.parametrize("i", range(3), ids=["logp", "old_logp", "ref_logp"])
def test_garbage_in_padding_changes_neither_grpo_nor_its_gradient(i):
    arrays, advantage_B = [draw(s) for s in (16, 17, 18)], draw(19, 4)
    evaluate = jax.jit(
        jax.value_and_grad(lambda x: losses.grpo_loss(*x, advantage_B, jnp.asarray(RAGGED_BR), Grpo()), has_aux=True)
    )
    expected = evaluate(arrays)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(expected))
    for garbage in GARBAGE:
        planted = [np.where(RAGGED_BR > 0, x, np.float32(garbage)) if j == i else x for j, x in enumerate(arrays)]
        jax.tree.map(np.testing.assert_array_equal, evaluate(planted), expected)


def test_garbage_in_padding_leaks_into_no_response():
    evaluate = jax.jit(jax.value_and_grad(lambda x: losses.rloo_loss(x, draw(20, 4), RAGGED_BR)[0]))
    expected = evaluate(draw(21))
    for garbage in GARBAGE:
        planted = np.where(RAGGED_BR > 0, draw(21), np.float32(garbage))
        jax.tree.map(np.testing.assert_array_equal, evaluate(planted), expected)
        close(losses.sequence_logp(planted, RAGGED_BR), (draw(21) * RAGGED_BR).sum(1))


@pytest.mark.parametrize("x_type", ["float64", "float16"])
def test_results_are_f32_whatever_comes_in(x_type):
    def every_function(x_BR, mask_BR):
        row_B = x_BR[:, 0]
        return [
            losses.sequence_logp(x_BR, mask_BR),
            losses.dpo_loss(row_B, -row_B, 2 * row_B, row_B, mask_BR[:, 0], 0.1, "sigmoid"),
            losses.dpo_loss(row_B, -row_B, 2 * row_B, row_B, mask_BR[:, 0], 0.1, "ipo"),
            [losses.combine_scores(x_BR, how, 0.5) for how in ("mean", "worst", "uncertainty")],
            losses.leave_one_out(x_BR),
            losses.rloo_loss(x_BR, row_B, mask_BR),
            [losses.group_advantages(x_BR, divide) for divide in (True, False)],
            losses.grpo_loss(x_BR, 2 * x_BR, x_BR, row_B, mask_BR, Grpo()),
            losses.forward_kl(x_BR, 2 * x_BR, 0.7),
        ]

    with jax.enable_x64(True):
        shapes = jax.eval_shape(every_function, jnp.asarray(draw(22), x_type), jnp.asarray(RAGGED_BR, "float64"))
    wrong = {jax.tree_util.keystr(k): v.dtype for k, v in jax.tree.leaves_with_path(shapes) if v.dtype != np.float32}
    assert not wrong


def test_jit_changes_nothing():
    args = draw(23), 0.5 * draw(24), draw(25), draw(26, 4), jnp.asarray(RAGGED_BR)
    loss = partial(losses.grpo_loss, c=Grpo())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), jax.jit(loss)(*args), loss(*args))
