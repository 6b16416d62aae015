"""PPO with a KL penalty to the SFT policy: sample, score, update.

Policy, reference, reward model and value share one frozen trunk. The sampler runs it, once a token; its hidden states
stay in the Rollout, so that the epochs touch TOP only. What RLOO and GRPO do alike is in `rollouts.py`: sampling,
reading all roles on one trunk, minibatches.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import losses, model, optim, rollouts
from jaxrlhf.config import Ppo
from jaxrlhf.experiment import Run
from jaxrlhf.reward import new_head
from jaxrlhf.types import ActorCritic, Fixed, PpoRollout, PromptBatch, Sample, ScalarHead, Scorer, TrainState

Metrics = dict[str, jax.Array]


def read_value(head: ScalarHead, final_BRD: jax.Array) -> jax.Array:
    """The value of a token, read before it is seen, where its log-probability is. [B, R]."""
    return final_BRD.astype(jnp.float32) @ head.w_D + head.b


@partial(jax.jit, static_argnames=("arch", "c"))
def score(
    arch: model.Architecture,
    c: Ppo,
    fixed: Fixed,
    policy: ActorCritic,
    kl_coef: jax.Array,
    prompts: PromptBatch,
    drawn: Sample,
    given_score_B: jax.Array | None = None,
) -> tuple[PpoRollout, Metrics]:
    """What all four roles make of the trunk's output, then token rewards and generalised advantages.

    `given_score_B` holds the scores where the reward model comes from elsewhere, with a trunk of its own.
    """
    seen, final_BRD, metrics = rollouts.look(arch, c, fixed, policy.top, prompts, drawn, c, given_score_B)
    mask_BR = seen.response_mask_BR
    value_BR = read_value(policy.value, final_BRD)
    kl_BR = losses.kl(seen.logp_BR, seen.ref_logp_BR, c.kl_estimator)
    reward_BR = losses.token_rewards(seen.score_B, kl_BR, mask_BR, kl_coef)
    if c.whiten_rewards:
        reward_BR = losses.masked_whiten(reward_BR, mask_BR, shift_mean=False)
    advantage_BR, return_BR = losses.gae(reward_BR, value_BR, mask_BR, c.gamma, c.lam)
    metrics |= {
        "kl_coef": kl_coef,
        "return": losses.masked_mean(return_BR, mask_BR),
        "explained_variance": losses.explained_variance(value_BR, return_BR, mask_BR),
    }
    if c.whiten_advantages:
        advantage_BR = losses.masked_whiten(advantage_BR, mask_BR)
    return PpoRollout(**vars(seen), value_BR=value_BR, advantage_BR=advantage_BR, return_BR=return_BR), metrics


@partial(jax.jit, static_argnames=("arch", "tx", "c"), donate_argnames=("state",))
def update(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    c: Ppo,
    state: TrainState,
    fixed: Fixed,
    rollout: PpoRollout,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Epochs of minibatch steps on TOP and value head; every response is visited exactly once an epoch."""
    B, R = rollout.response_mask_BR.shape

    def loss(policy: ActorCritic, mb: PpoRollout) -> tuple[jax.Array, Metrics]:
        trunk = mb.tokens_BT, mb.hidden_BTD, mb.mask_BT
        final_BRD = rollouts.final_states(arch, policy.top, *trunk, R)
        logp_BR, entropy_BR = rollouts.read(
            arch, fixed.frozen, policy.top, final_BRD, mb.tokens_BT, c.temperature, entropy_gradient=c.entropy_coef != 0
        )
        total, metrics = losses.ppo_loss(
            logp_BR,
            read_value(policy.value, final_BRD),
            entropy_BR,
            mb.logp_BR,
            mb.value_BR,
            mb.advantage_BR,
            mb.return_BR,
            mb.response_mask_BR,
            c,
        )
        if c.forward_kl_coef:
            ref_BRD = rollouts.final_states(arch, fixed.ref, *trunk, R)
            kl_BR = rollouts.forward_kl(arch, fixed.frozen, fixed.ref, ref_BRD, policy.top, final_BRD, c.temperature)
            metrics["forward_kl"] = losses.masked_mean(kl_BR, mb.response_mask_BR)
            total += c.forward_kl_coef * metrics["forward_kl"]
        return total, metrics

    state, metrics = rollouts.epochs(tx, loss, lambda mb: mb.response_mask_BR.sum(), state, rollout, key, c.epochs, c)
    if c.kl_target and state.kl_coef is not None:
        kl = ((rollout.logp_BR - rollout.ref_logp_BR) * rollout.response_mask_BR).sum(-1).mean()
        adapted = losses.adapt_kl_coef(state.kl_coef, kl, c.kl_target, c.kl_horizon, B)
        kl_coef = jnp.where(jnp.isfinite(kl), adapted, state.kl_coef)
        state = state.replace(kl_coef=kl_coef)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics


def ppo(run: Run) -> None:
    """Trains the policy from SFT against the reward model, with one frozen trunk for all four roles."""
    c = run.config.ppo
    held = rollouts.roles(run)
    tx = optim.optimizer(c.optim, c.loop.steps * c.epochs * c.minibatches)
    start = ActorCritic(top=held.fixed.ref, value=_value_head(run, held.fixed))
    state = optim.new_state(tx, start, run.mesh, kl_coef=jnp.float32(c.kl_coef))

    def learn(
        state: TrainState, prompts: PromptBatch, drawn: Sample, given_B: jax.Array | None, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        assert state.kl_coef is not None
        rollout, seen = score(run.arch, c, held.fixed, state.params, state.kl_coef, prompts, drawn, given_B)
        state, learnt = update(run.arch, tx, c, state, held.fixed, rollout, key)
        return state, seen | learnt

    rollouts.train(run, "ppo", c, held, state, lambda policy: policy.top, learn)


def _value_head(run: Run, fixed: Fixed) -> ScalarHead:
    if isinstance(fixed.scorer, Scorer) and run.config.ppo.value_init == "reward":
        return fixed.scorer.head
    return new_head(run, "value head") if run.config.ppo.value_init == "normal" else run.head()
