"""The maths of every method: arrays in, numbers out, f32, masked means only.

Masks are f32, 1 = real token. Whatever stands on padding changes neither values nor gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrlhf.config import Grpo, Ppo

Metrics = dict[str, jax.Array]


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """sum(x * mask) / sum(mask), f32 scalar, for any shape; 0 for an empty mask.

    The released code of Kirk et al. (2024) divides by the padded size instead, so short answers weigh less.
    """
    total = mask.astype(jnp.float32).sum()
    return (_real(x, mask) * mask).astype(jnp.float32).sum() / jnp.where(total > 0, total, 1.0)


def _real(x: jax.Array, mask: jax.Array) -> jax.Array:
    # A select, not a product: 0 * inf would be NaN.
    return jnp.where(mask > 0, x, 0.0).astype(jnp.float32)


def masked_whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8), mean and variance over real tokens; f32 of the shape of `x`, padding becomes 0.

    Without `shift_mean` the mean is added back, as for whitened rewards (Huang et al. 2024, N+ details).
    """
    mean = masked_mean(x, mask)
    centred = jnp.where(mask > 0, x, mean).astype(jnp.float32) - mean
    whitened = centred * jax.lax.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0.0)


def token_logp(logits_BRV: jax.Array, target_BR: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Log softmax(logits / temperature) at each target, and the entropy in nats of each distribution: two f32 [B, R].

    `temperature` > 0. Logits of -inf are words that cannot be drawn; they add nothing to the entropy.
    """
    logp_BRV = jax.nn.log_softmax(logits_BRV.astype(jnp.float32) / temperature, axis=-1)
    # p log p is 0 at p = 0; the select keeps 0 * inf out of value and gradient.
    entropy_BR = -(jnp.exp(logp_BRV) * jnp.where(jnp.isfinite(logp_BRV), logp_BRV, 0.0)).sum(-1)
    return jnp.take_along_axis(logp_BRV, target_BR[..., None], -1)[..., 0], entropy_BR


def reward_loss(chosen_BN: jax.Array, rejected_BN: jax.Array, mask_BN: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean of -log sigmoid(chosen - rejected) over pairs (Stiennon et al. 2020, s. 3.4), for any shape.

    Ties count half in the accuracy.
    """
    margin_BN = _real(chosen_BN, mask_BN) - _real(rejected_BN, mask_BN)
    right_BN = jnp.where(margin_BN == 0, 0.5, margin_BN > 0)
    found = {"loss": -jax.nn.log_sigmoid(margin_BN), "accuracy": right_BN, "margin": margin_BN}
    metrics = {name: masked_mean(x_BN, mask_BN) for name, x_BN in found.items()}
    return metrics["loss"], metrics


def combine_scores(score_EB: jax.Array, how: str, uncertainty_coef: float) -> jax.Array:
    """One score [B], f32, from those of an ensemble's E members (Coste et al. 2024).

    mean: their mean; worst: the lowest of each response (WCO); uncertainty: mean - uncertainty_coef * variance (UWO),
    the variance over E. Any other `how` is a ValueError.
    """
    score_EB = score_EB.astype(jnp.float32)
    if how == "mean":
        return score_EB.mean(0)
    if how == "worst":
        return score_EB.min(0)
    if how == "uncertainty":
        return score_EB.mean(0) - uncertainty_coef * score_EB.var(0)
    raise ValueError(f"unknown combination {how!r}; known are mean, worst, uncertainty")


def sequence_logp(logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Log-probability of the last axis' real tokens together, in nats: f32 of the rest."""
    return _real(logp_BT, mask_BT).sum(-1)


def dpo_loss(
    chosen_BN: jax.Array,
    rejected_BN: jax.Array,
    ref_chosen_BN: jax.Array,
    ref_rejected_BN: jax.Array,
    mask_BN: jax.Array,
    beta: float,
    kind: str,
) -> tuple[jax.Array, Metrics]:
    """Preferences without a reward model, from log-probabilities of whole responses under policy and reference.

    With implicit rewards r = beta * (logp - ref): `sigmoid` is mean -log sigmoid(r_chosen - r_rejected) (Rafailov et
    al. 2023, eq. 7); `ipo` is mean (h - 1 / (2 beta))^2, h = (r_chosen - r_rejected) / beta, whose beta is the tau of
    Azar et al. 2023, eq. 17. Log-probabilities are sums over tokens, as there, not means. `margin` is r_chosen -
    r_rejected; ties count half in the accuracy. Any other kind is a ValueError.
    """
    won_BN = _real(chosen_BN, mask_BN) - _real(ref_chosen_BN, mask_BN)
    lost_BN = _real(rejected_BN, mask_BN) - _real(ref_rejected_BN, mask_BN)
    sigmoid, metrics = reward_loss(beta * won_BN, beta * lost_BN, mask_BN)
    losses = {"sigmoid": sigmoid, "ipo": masked_mean((won_BN - lost_BN - 0.5 / beta) ** 2, mask_BN)}
    if kind not in losses:
        raise ValueError(f"unknown DPO loss {kind!r}; known are sigmoid, ipo")
    rewards = {"chosen_reward": beta * masked_mean(won_BN, mask_BN)}
    rewards["rejected_reward"] = beta * masked_mean(lost_BN, mask_BN)
    return losses[kind], metrics | rewards | {"loss": losses[kind]}


def kl(logp_BR: jax.Array, ref_logp_BR: jax.Array, kind: str) -> jax.Array:
    """Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL").

    With d = logp - ref: k1 = d, unbiased; k2 = d^2 / 2, biased, low variance; k3 = exp(-d) - 1 + d, unbiased, >= 0.
    f32 [B, R]; padding is not masked here. Any other kind is a ValueError.
    """
    d_BR = logp_BR.astype(jnp.float32) - ref_logp_BR.astype(jnp.float32)
    if kind == "k1":
        return d_BR
    if kind == "k2":
        return d_BR**2 / 2
    if kind == "k3":
        return jnp.expm1(-d_BR) + d_BR
    raise ValueError(f"unknown KL estimator {kind!r}; known are k1, k2, k3")


def forward_kl(ref_logits_V: jax.Array, logits_V: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(reference || policy) of next-token distributions, over all words of the last axis, in nats; f32 of the rest.

    Exact, not estimated. It grows where the policy drops what the reference says (mass-covering), unlike the reverse
    KL, which lets it. The gradient is the policy's alone. Words that the reference cannot draw add nothing.
    """
    ref_V = jax.nn.log_softmax(jax.lax.stop_gradient(ref_logits_V).astype(jnp.float32) / temperature, axis=-1)
    logp_V = jax.nn.log_softmax(logits_V.astype(jnp.float32) / temperature, axis=-1)
    # As in `token_logp`: 0 at p = 0, and no -inf less -inf.
    drawn_V = jnp.isfinite(ref_V)
    return (jnp.exp(ref_V) * (jnp.where(drawn_V, ref_V, 0.0) - jnp.where(drawn_V, logp_V, 0.0))).sum(-1)


def adapt_kl_coef(coef: jax.Array, observed_kl: jax.Array, target: float, horizon: int, n: int) -> jax.Array:
    """After n responses, coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon) (Ziegler et al. 2019, s. 2.2)."""
    error = jnp.clip(observed_kl / target - 1.0, -0.2, 0.2)
    return (coef * (1.0 + error * (n / horizon))).astype(jnp.float32)


def score_penalties(
    score_B: jax.Array, length_B: jax.Array, finished_B: jax.Array, c: Ppo, max_length: int
) -> jax.Array:
    """The shaped score: score - length_penalty * (length / max_length)^5 + eos_bonus if finished; f32 [B].

    With `eos_required` the whole score of an unfinished response is `eos_missing` (-1 in Huang et al. 2024). Penalty
    and bonus are options of the code of Kirk et al. (2024), off by default.
    """
    share_B = length_B.astype(jnp.float32) / max_length
    shaped_B = score_B.astype(jnp.float32) - c.length_penalty * share_B**5 + jnp.where(finished_B, c.eos_bonus, 0.0)
    return jnp.where(finished_B, shaped_B, c.eos_missing) if c.eos_required else shaped_B


def token_rewards(score_B: jax.Array, kl_BR: jax.Array, mask_BR: jax.Array, kl_coef: jax.Array | float) -> jax.Array:
    """-kl_coef * kl on each real token, plus the score on the last real one (Ziegler et al. 2019, eq. 2). f32 [B, R].

    The last token is read off the mask of right-padded rows; a row without any real token gets no reward.
    """
    position_R = jnp.arange(mask_BR.shape[1])
    last_B1 = jnp.where(mask_BR > 0, position_R, -1).max(-1, keepdims=True)
    penalty_BR = kl_coef * _real(kl_BR, mask_BR)
    return (jnp.where(position_R == last_B1, score_B[:, None], 0.0) - penalty_BR).astype(jnp.float32)


def gae(
    reward_BR: jax.Array, value_BR: jax.Array, mask_BR: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantages and returns (Schulman et al. 2016, eq. 16) of right-padded rows; padding gets 0.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; V and A are 0 after the last real token.
    """
    reward_BR, value_BR = _real(reward_BR, mask_BR), _real(value_BR, mask_BR)
    next_BR = jnp.pad(value_BR[:, 1:], ((0, 0), (0, 1)))
    delta_BR = reward_BR + gamma * next_BR - value_BR

    def back(advantage_B: jax.Array, delta_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage_B = delta_B + gamma * lam * advantage_B
        return advantage_B, advantage_B

    _, advantage_RB = jax.lax.scan(back, jnp.zeros_like(delta_BR[:, 0]), delta_BR.T, reverse=True)
    return advantage_RB.T, advantage_RB.T + value_BR


def ppo_loss(
    logp_BR: jax.Array,
    value_BR: jax.Array,
    entropy_BR: jax.Array,
    old_logp_BR: jax.Array,
    old_value_BR: jax.Array,
    advantage_BR: jax.Array,
    return_BR: jax.Array,
    mask_BR: jax.Array,
    c: Ppo,
) -> tuple[jax.Array, Metrics]:
    """Clipped policy and value losses (Schulman et al. 2017, eq. 7 and 9; value clipping as in Huang et al. 2024).

    mean max(-A r, -A clip(r, 1 - e, 1 + e)) + value_coef * mean .5 max((V - G)^2, (clip(V) - G)^2) - entropy_coef * H,
    r = exp(logp - old_logp), clip(V) within `value_clip` of the old value, all means over real tokens of [B, R].
    Advantages are whitened by the caller, once over the rollout batch. `approx_kl` is k3 of KL(old || new).
    """
    # Padding is silenced before any square, so that nothing there can turn a gradient into NaN.
    log_ratio_BR, ratio_BR, plain_BR, clipped_BR = _clipped(logp_BR, old_logp_BR, advantage_BR, mask_BR, c.clip)
    value_BR, old_value_BR, return_BR = (_real(x, mask_BR) for x in (value_BR, old_value_BR, return_BR))
    policy_loss = masked_mean(jnp.maximum(plain_BR, clipped_BR), mask_BR)
    near_BR = old_value_BR + jnp.clip(value_BR - old_value_BR, -c.value_clip, c.value_clip)
    square_BR, near_square_BR = (value_BR - return_BR) ** 2, (near_BR - return_BR) ** 2
    value_loss = 0.5 * masked_mean(jnp.maximum(square_BR, near_square_BR), mask_BR)
    entropy = masked_mean(entropy_BR, mask_BR)
    loss = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "ratio": masked_mean(ratio_BR, mask_BR),
        "clip_fraction": masked_mean((clipped_BR > plain_BR).astype(jnp.float32), mask_BR),
        "value_clip_fraction": masked_mean((near_square_BR > square_BR).astype(jnp.float32), mask_BR),
        "approx_kl": masked_mean(jnp.expm1(log_ratio_BR) - log_ratio_BR, mask_BR),
    }


def _clipped(
    logp_BR: jax.Array, old_logp_BR: jax.Array, advantage_BR: jax.Array, mask_BR: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-ratio, ratio, and -A r plain and clipped. Padding is silenced before any exp, as a gradient could be NaN."""
    log_ratio_BR = _real(logp_BR, mask_BR) - _real(old_logp_BR, mask_BR)
    ratio_BR, advantage_BR = jnp.exp(log_ratio_BR), _real(advantage_BR, mask_BR)
    return log_ratio_BR, ratio_BR, -advantage_BR * ratio_BR, -advantage_BR * jnp.clip(ratio_BR, 1 - clip, 1 + clip)


def leave_one_out(return_BN: jax.Array) -> jax.Array:
    """Each response's return less the mean of the N - 1 others of its prompt, f32 (Ahmadian et al. 2024).

    The baseline does not hang on the response that it is taken from, so the policy gradient stays unbiased.
    """
    return_BN = return_BN.astype(jnp.float32)
    N = return_BN.shape[-1]
    return (return_BN - return_BN.mean(-1, keepdims=True)) * (N / (N - 1))


def rloo_loss(logp_BR: jax.Array, advantage_B: jax.Array, mask_BR: jax.Array) -> tuple[jax.Array, Metrics]:
    """REINFORCE on whole responses: mean over B of -A log p(response) (Ahmadian et al. 2024).

    No ratio and no clipping: right for responses of the policy as it is.
    """
    loss = -(advantage_B.astype(jnp.float32) * sequence_logp(logp_BR, mask_BR)).mean()
    return loss, {"loss": loss}


def group_advantages(score_BN: jax.Array, divide: bool = True) -> jax.Array:
    """(score - mean) / (std + 1e-4) over the N responses of each prompt, f32 (Shao et al. 2024, s. 4.1.2).

    Dividing by the standard deviation makes prompts on which scores hardly differ weigh as much as others (Liu et al.
    2025); without `divide` they do not.
    """
    centred_BN = score_BN.astype(jnp.float32) - score_BN.astype(jnp.float32).mean(-1, keepdims=True)
    return centred_BN / (jnp.sqrt((centred_BN**2).mean(-1, keepdims=True)) + 1e-4) if divide else centred_BN


def grpo_loss(
    logp_BR: jax.Array,
    old_logp_BR: jax.Array,
    ref_logp_BR: jax.Array,
    advantage_B: jax.Array,
    mask_BR: jax.Array,
    c: Grpo,
) -> tuple[jax.Array, Metrics]:
    """Clipped policy loss plus kl_coef * k3 of KL(policy || reference), token by token (Shao et al. 2024, eq. 3 and 4).

    Of each response the mean over its tokens, then the mean over B: tokens of long responses weigh less, so that a bad
    response is better long (Liu et al. 2025). With `unbiased` each token weighs 1 / R, as there. A row without any real
    token counts as 0. `approx_kl` is k3 of KL(old || new), `ref_kl` the penalty before its coefficient.
    """
    logp_BR = _real(logp_BR, mask_BR)
    log_ratio_BR, ratio_BR, plain_BR, clipped_BR = _clipped(logp_BR, old_logp_BR, advantage_B[:, None], mask_BR, c.clip)
    penalty_BR = kl(logp_BR, _real(ref_logp_BR, mask_BR), "k3")
    token_BR = jnp.maximum(plain_BR, clipped_BR) + c.kl_coef * penalty_BR
    length_B = mask_BR.astype(jnp.float32).sum(-1)
    share_B = jnp.float32(mask_BR.shape[1]) if c.unbiased else jnp.where(length_B > 0, length_B, 1.0)
    loss = ((token_BR * mask_BR).sum(-1) / share_B).mean().astype(jnp.float32)
    return loss, {
        "loss": loss,
        "ref_kl": masked_mean(penalty_BR, mask_BR),
        "ratio": masked_mean(ratio_BR, mask_BR),
        "clip_fraction": masked_mean((clipped_BR > plain_BR).astype(jnp.float32), mask_BR),
        "approx_kl": masked_mean(jnp.expm1(log_ratio_BR) - log_ratio_BR, mask_BR),
    }


def explained_variance(value_BR: jax.Array, return_BR: jax.Array, mask_BR: jax.Array) -> jax.Array:
    """1 - Var(return - value) / Var(return) over real tokens; 0 where the returns do not vary."""

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean((x - masked_mean(x, mask_BR)) ** 2, mask_BR)

    value_BR, return_BR = _real(value_BR, mask_BR), _real(return_BR, mask_BR)
    total = variance(return_BR)
    return jnp.where(total > 1e-8, 1.0 - variance(return_BR - value_BR) / jnp.maximum(total, 1e-8), 0.0)
