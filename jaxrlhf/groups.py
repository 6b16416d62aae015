"""RLOO and GRPO: a prompt's responses are each other's baseline, so there is no value to learn.

A step is PPO's: sample, score, update, on the same trunk. Here too scores are shaped as `config.ppo` says, so that all
methods climb the same reward.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrlhf import losses, model, optim, rollouts
from jaxrlhf.config import Grpo, Ppo, Rloo
from jaxrlhf.experiment import Run
from jaxrlhf.types import Fixed, Frozen, GroupRollout, PromptBatch, Sample, Top, TrainState

Metrics = dict[str, jax.Array]


@partial(jax.jit, static_argnames=("arch", "shaping", "c"))
def score(
    arch: model.Architecture,
    shaping: Ppo,
    c: Rloo | Grpo,
    fixed: Fixed,
    top: Top,
    prompts: PromptBatch,
    drawn: Sample,
    given_score_B: jax.Array | None = None,
) -> tuple[GroupRollout, Metrics]:
    """What all roles make of the trunk's output, then each response's advantage over its group; rows are prompt-major.

    RLOO's return is the score less kl_coef * the response's log-ratio to the reference; GRPO's is the score, as its KL
    is in the loss.
    """
    seen, _, metrics = rollouts.look(arch, shaping, fixed, top, prompts, drawn, c, given_score_B)
    if isinstance(c, Rloo):
        kl_B = losses.sequence_logp(losses.kl(seen.logp_BR, seen.ref_logp_BR, "k1"), seen.response_mask_BR)
        return_BN = (seen.score_B - c.kl_coef * kl_B).reshape(-1, c.samples)
        advantage_BN = losses.leave_one_out(return_BN)
    else:
        return_BN = seen.score_B.reshape(-1, c.samples)
        advantage_BN = losses.group_advantages(return_BN, divide=not c.unbiased)
    metrics |= {"return": return_BN.mean(), "group_std": return_BN.std(-1).mean()}
    return GroupRollout(**vars(seen), advantage_B=advantage_BN.reshape(-1)), metrics


@partial(jax.jit, static_argnames=("arch", "tx", "c"), donate_argnames=("state",))
def update(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    c: Rloo | Grpo,
    state: TrainState,
    frozen: Frozen,
    rollout: GroupRollout,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Minibatch steps on TOP: RLOO looks at each response once, GRPO once an epoch."""
    R = rollout.response_mask_BR.shape[1]

    def loss(top: Top, mb: GroupRollout) -> tuple[jax.Array, Metrics]:
        final_BRD = rollouts.final_states(arch, top, mb.tokens_BT, mb.hidden_BTD, mb.mask_BT, R)
        logp_BR, entropy_BR = rollouts.read(arch, frozen, top, final_BRD, mb.tokens_BT, c.temperature)
        mask_BR = mb.response_mask_BR
        if isinstance(c, Rloo):
            value, metrics = losses.rloo_loss(logp_BR, mb.advantage_B, mask_BR)
        else:
            value, metrics = losses.grpo_loss(logp_BR, mb.logp_BR, mb.ref_logp_BR, mb.advantage_B, mask_BR, c)
        return value, metrics | {"entropy": losses.masked_mean(entropy_BR, mask_BR)}

    once = isinstance(c, Rloo)
    return rollouts.epochs(tx, loss, lambda _: jnp.float32(1), state, rollout, key, 1 if once else c.epochs, c)


def rloo(run: Run) -> None:
    """REINFORCE with a leave-one-out baseline against the reward model, from SFT (Ahmadian et al. 2024)."""
    _train(run, "rloo", run.config.rloo, 1)


def grpo(run: Run) -> None:
    """Group-relative policy optimisation against the reward model, from SFT (Shao et al. 2024; Liu et al. 2025)."""
    _train(run, "grpo", run.config.grpo, run.config.grpo.epochs)


def _train(run: Run, stage: str, c: Rloo | Grpo, epochs: int) -> None:
    held, shaping = rollouts.roles(run), run.config.ppo
    tx = optim.optimizer(c.optim, c.loop.steps * epochs * c.minibatches)

    def learn(
        state: TrainState, prompts: PromptBatch, drawn: Sample, given_B: jax.Array | None, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        rollout, seen = score(run.arch, shaping, c, held.fixed, state.params, prompts, drawn, given_B)
        state, learnt = update(run.arch, tx, c, state, held.fixed.frozen, rollout, key)
        return state, seen | learnt

    state = optim.new_state(tx, held.fixed.ref, run.mesh)
    rollouts.train(run, stage, c, held, state, lambda top: top, learn, c.samples)
