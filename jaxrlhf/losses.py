"""The maths of SFT, reward modelling and PPO: arrays in, numbers out, f32, masked means only.

Masks are f32, 1 = real token. Whatever stands on padding changes neither values nor gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrlhf.config import Ppo

Metrics = dict[str, jax.Array]


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` where `mask` is 1; 0 for an empty mask."""
    mask = mask.astype(jnp.float32)
    return jnp.where(mask > 0, x, 0.0).astype(jnp.float32).sum() / jnp.maximum(mask.sum(), 1.0)


def masked_whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8) over real tokens; without `shift_mean` the mean is added back. Padding becomes 0."""
    mean = masked_mean(x, mask)
    centred = jnp.where(mask > 0, x, mean).astype(jnp.float32) - mean
    whitened = centred * jax.lax.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return jnp.where(mask > 0, whitened if shift_mean else whitened + mean, 0.0)


def token_logp(logits_BRV: jax.Array, target_BR: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and the entropy of each distribution, at a temperature: two f32 [B, R]."""
    logp_BRV = jax.nn.log_softmax(logits_BRV.astype(jnp.float32) / temperature, axis=-1)
    entropy_BR = -(jnp.exp(logp_BRV) * logp_BRV).sum(-1)
    return jnp.take_along_axis(logp_BRV, target_BR[..., None], -1)[..., 0], entropy_BR


def sft_loss(logp_BT: jax.Array, weight_BT: jax.Array) -> tuple[jax.Array, Metrics]:
    """Weighted mean of -log p: sum(w * -logp) / sum(w)."""
    tokens = weight_BT.astype(jnp.float32).sum()
    nll = jnp.where(weight_BT > 0, -logp_BT * weight_BT, 0.0).astype(jnp.float32).sum()
    loss = nll / jnp.maximum(tokens, 1e-8)
    return loss, {"loss": loss, "tokens": tokens}


def reward_loss(chosen_B: jax.Array, rejected_B: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean of -log sigmoid(chosen - rejected) (Stiennon et al. 2020, eq. 1); ties count half in the accuracy."""
    margin_B = chosen_B.astype(jnp.float32) - rejected_B.astype(jnp.float32)
    loss = -jax.nn.log_sigmoid(margin_B).mean()
    accuracy = jnp.where(margin_B == 0, 0.5, (margin_B > 0).astype(jnp.float32)).mean()
    return loss, {"loss": loss, "accuracy": accuracy, "margin": margin_B.mean()}


def kl(logp_BR: jax.Array, ref_logp_BR: jax.Array, kind: str) -> jax.Array:
    """Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL").

    With d = logp - ref: k1 = d, unbiased; k2 = d^2 / 2, biased, low variance; k3 = exp(-d) - 1 + d, unbiased, >= 0.
    """
    d_BR = logp_BR.astype(jnp.float32) - ref_logp_BR.astype(jnp.float32)
    if kind == "k1":
        return d_BR
    if kind == "k2":
        return d_BR**2 / 2
    if kind == "k3":
        return jnp.expm1(-d_BR) + d_BR
    raise ValueError(f"unknown KL estimator {kind!r}; known are k1, k2, k3")


def adapt_kl_coef(coef: jax.Array, observed_kl: jax.Array, target: float, horizon: int, n: int) -> jax.Array:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon) (Ziegler et al. 2019, s. 2.2), after n responses."""
    error = jnp.clip(observed_kl / target - 1.0, -0.2, 0.2)
    return (coef * (1.0 + error * (n / horizon))).astype(jnp.float32)


def score_penalties(score_B: jax.Array, length_B: jax.Array, finished_B: jax.Array, c: Ppo, max_length: int) -> jax.Array:
    """The released code's shaping of the score (Kirk et al. 2024): length penalty, end-of-text bonus and requirement."""
    length_B = length_B.astype(jnp.float32) / max_length
    shaped_B = score_B.astype(jnp.float32) - c.length_penalty * length_B**5 + jnp.where(finished_B, c.eos_bonus, 0.0)
    return jnp.where(finished_B, shaped_B, c.eos_missing) if c.eos_required else shaped_B


def token_rewards(score_B: jax.Array, kl_BR: jax.Array, mask_BR: jax.Array, kl_coef: jax.Array | float) -> jax.Array:
    """-kl_coef * kl on each real token, plus the score on the last real one of right-padded rows. f32 [B, R]."""
    position_R = jnp.arange(mask_BR.shape[1])
    last_B1 = jnp.where(mask_BR > 0, position_R, -1).max(-1, keepdims=True)
    reward_BR = jnp.where(mask_BR > 0, -kl_coef * kl_BR, 0.0)
    return reward_BR + jnp.where(position_R == last_B1, score_B[:, None], 0.0).astype(jnp.float32)


def gae(
    reward_BR: jax.Array, value_BR: jax.Array, mask_BR: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantages and returns (Schulman et al. 2016, eq. 16) of right-padded rows; padding gets 0.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; V and A are 0 after the last real token.
    """
    reward_BR = jnp.where(mask_BR > 0, reward_BR, 0.0).astype(jnp.float32)
    value_BR = jnp.where(mask_BR > 0, value_BR, 0.0).astype(jnp.float32)
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

    mean max(-A r, -A clip(r, 1 - e, 1 + e)) + value_coef * mean .5 max((V - G)^2, (clip(V) - G)^2) - entropy_coef * H.
    """
    # Padding is silenced before any exp or square, so that nothing there can turn a gradient into NaN.
    real = mask_BR > 0
    log_ratio_BR = jnp.where(real, logp_BR - old_logp_BR, 0.0)
    value_BR = jnp.where(real, value_BR, 0.0)
    old_value_BR, return_BR = jnp.where(real, old_value_BR, 0.0), jnp.where(real, return_BR, 0.0)
    advantage_BR = jnp.where(real, advantage_BR, 0.0)
    ratio_BR = jnp.exp(log_ratio_BR)
    plain_BR = -advantage_BR * ratio_BR
    clipped_BR = -advantage_BR * jnp.clip(ratio_BR, 1 - c.clip, 1 + c.clip)
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


def explained_variance(value_BR: jax.Array, return_BR: jax.Array, mask_BR: jax.Array) -> jax.Array:
    """1 - Var(return - value) / Var(return) over real tokens; 0 where the returns do not vary."""

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean((x - masked_mean(x, mask_BR)) ** 2, mask_BR)

    total = variance(return_BR)
    return jnp.where(total > 1e-8, 1.0 - variance(return_BR - value_BR) / jnp.maximum(total, 1e-8), 0.0)
