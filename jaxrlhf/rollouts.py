"""What PPO, RLOO and GRPO share: sampling, what all roles make of its trunk, epochs of minibatch steps on TOP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import head, loop, losses, model, optim, policies, sampling, scoring, sharding
from jaxrlhf.config import Grpo, Ppo, Rloo
from jaxrlhf.data import batches
from jaxrlhf.experiment import Run
from jaxrlhf.parts import in_parts
from jaxrlhf.types import Fixed, Frozen, PromptBatch, Rollout, Sample, Top, TrainState

Metrics = dict[str, jax.Array]
# (state, prompts, responses, their scores where the reward model comes from elsewhere, key) -> (state, metrics)
Learn = Callable[[TrainState, PromptBatch, Sample, jax.Array | None, jax.Array], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Roles:
    """Who takes part beside the policy."""

    fixed: Fixed
    elsewhere: policies.Score | None  # the reward model's scores, where it has a trunk of its own


def roles(run: Run) -> Roles:
    """The trunk, SFT as the reference, and the reward model."""
    reward, theirs = scoring.of_run(run), None
    if isinstance(reward, scoring.RewardModel):
        reward, theirs = None, scoring.scored_by(run, reward)
    return Roles(Fixed(frozen=run.base[0], ref=run.policy("sft"), scorer=reward), theirs)


def final_states(
    arch: model.Architecture, top: Top, token_BT: jax.Array, hidden_BTD: jax.Array, mask_BT: jax.Array, responses: int
) -> jax.Array:
    """Final hidden states [B, R, D] from which the last `responses` tokens are predicted, from the trunk's output."""
    return model.run_top(arch, top, token_BT, hidden_BTD, mask_BT, lambda x: x[:, -responses - 1 : -1])


def read(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    final_BRD: jax.Array,
    token_BT: jax.Array,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy [B, R] at the last R tokens, from `final_states`.

    Without `entropy_gradient` the entropy has none, which spares holding the logits.
    """
    target_BR = token_BT[:, -final_BRD.shape[1] :]
    if entropy_gradient:
        return losses.token_logp(model.logits(arch, frozen, top, final_BRD), target_BR, temperature)
    return head.logp(arch, frozen, top, final_BRD, target_BR, temperature)


@partial(jax.jit, static_argnames=("arch", "responses", "temperature"))
def log_ratio(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    ref: Top,
    token_BT: jax.Array,
    mask_BT: jax.Array,
    responses: int,
    temperature: float,
) -> jax.Array:
    """Log-probability [B] of each row's last `responses` tokens, less the reference's, in nats.

    Its mean over the policy's own samples is an unbiased estimate of KL(policy || reference) a response, both at this
    temperature. One position's logits are held at a time.
    """
    hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
    final, ref_final = (final_states(arch, t, token_BT, hidden_BTD, mask_BT, responses) for t in (top, ref))

    def at(x: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        own_BD, ref_BD, token_B = x
        logits = (model.logits(arch, frozen, t, h_BD) for t, h_BD in ((top, own_BD), (ref, ref_BD)))
        logp_B, ref_logp_B = (losses.token_logp(logits_BV, token_B, temperature)[0] for logits_BV in logits)
        return logp_B - ref_logp_B

    ratio_RB = jax.lax.map(at, (final.swapaxes(0, 1), ref_final.swapaxes(0, 1), token_BT[:, -responses:].T))
    return (ratio_RB.T * mask_BT[:, -responses:]).sum(-1)


def forward_kl(
    arch: model.Architecture,
    frozen: Frozen,
    ref: Top,
    ref_final_BRD: jax.Array,
    top: Top,
    final_BRD: jax.Array,
    temperature: float,
) -> jax.Array:
    """KL(reference || policy) [B, R] in nats at each token of a rollout, over the whole vocabulary.

    The states are the policy's, where it acts, and count as given; so this is no unbiased estimate of the KL of whole
    responses, which would take samples of the reference. One position's logits are held at a time, also for gradients.
    """

    @jax.checkpoint
    def at(final: tuple[jax.Array, jax.Array]) -> jax.Array:
        ref_BV, own_BV = (model.logits(arch, frozen, t, f) for t, f in zip((ref, top), final, strict=True))
        return losses.forward_kl(ref_BV, own_BV, temperature)

    return jax.lax.map(at, (ref_final_BRD.swapaxes(0, 1), final_BRD.swapaxes(0, 1))).T


def look(
    arch: model.Architecture,
    shaping: Ppo,
    fixed: Fixed,
    top: Top,
    prompts: PromptBatch,
    drawn: Sample,
    c: Ppo | Rloo | Grpo,
    given_score_B: jax.Array | None,
) -> tuple[Rollout, jax.Array, Metrics]:
    """What policy, reference and reward model make of the trunk's output: the rollout, its final states, metrics.

    The output is the sampler's, or else that of one pass of the trunk. `prompts` has a row for each response.
    `given_score_B` holds the scores where the reward model comes from elsewhere. As many rows are read at a time as an
    update learns from, where that takes nothing but less memory.
    """
    temperature, parts = c.temperature, c.minibatches * c.optim.accumulate
    R = drawn.tokens_BR.shape[1]
    token_BT = jnp.concatenate([prompts.tokens_BP, drawn.tokens_BR], 1)
    mask_BT = jnp.concatenate([prompts.mask_BP, drawn.mask_BR], 1)
    mask_BR, length_B = drawn.mask_BR, drawn.mask_BR.sum(-1)

    def read_all(rows: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[Any, ...]:
        hidden_bTD = model.trunk(arch, fixed.frozen, *rows[:2]) if rows[2] is None else rows[2]
        final_bRD, ref_bRD = (final_states(arch, t, rows[0], hidden_bTD, rows[1], R) for t in (top, fixed.ref))
        own = read(arch, fixed.frozen, top, final_bRD, rows[0], temperature)
        ref_logp_bR, _ = read(arch, fixed.frozen, fixed.ref, ref_bRD, rows[0], temperature)
        score_b = () if fixed.scorer is None else (policies.read_out(arch, fixed.scorer, rows[0], hidden_bTD, rows[1]),)
        return None if rows[2] is not None else hidden_bTD, final_bRD, *own, ref_logp_bR, *score_b

    found = in_parts(read_all, (token_BT, mask_BT, drawn.hidden_BTD), parts)
    hidden_BTD, final_BRD, logp_BR, entropy_BR, ref_logp_BR, *scores = found
    hidden_BTD = hidden_BTD if drawn.hidden_BTD is None else drawn.hidden_BTD
    model_score_B = scores[0] if scores else given_score_B
    assert model_score_B is not None
    score_B = losses.score_penalties(model_score_B, length_B, drawn.finished_B, shaping, R)
    rollout = Rollout(
        tokens_BT=token_BT,
        mask_BT=mask_BT,
        response_mask_BR=mask_BR,
        hidden_BTD=hidden_BTD,
        logp_BR=logp_BR,
        ref_logp_BR=ref_logp_BR,
        score_B=score_B,
    )
    metrics = {
        "score": model_score_B.mean(),
        "score_with_penalties": score_B.mean(),
        "kl": (losses.kl(logp_BR, ref_logp_BR, "k1") * mask_BR).sum(-1).mean(),  # nats a response
        "length": length_B.mean(),
        "finished": drawn.finished_B.astype(jnp.float32).mean(),
        "rollout_entropy": losses.masked_mean(entropy_BR, mask_BR),
        # The sampler decodes token by token, the scorer in one pass: the gap is rounding, or a bug.
        "sampler_gap": jnp.abs((logp_BR - drawn.logp_BR) * mask_BR).max(),
    }
    return rollout, final_BRD, metrics


def epochs(
    tx: optax.GradientTransformation,
    loss: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    weight: Callable[[Any], jax.Array],
    state: TrainState,
    rollout: Rollout,
    key: jax.Array,
    epochs: int,
    c: Ppo | Rloo | Grpo,
) -> tuple[TrainState, Metrics]:
    """Minibatch steps on what is trained; every response is visited exactly once an epoch. Metrics are their means.

    A minibatch is worked through in `c.optim.accumulate` parts; `weight` of one is what its loss divides by.
    """
    B = rollout.score_B.shape[0]

    def minibatch(state: TrainState, index_b: jax.Array) -> tuple[TrainState, Metrics]:
        mb = jax.tree.map(lambda x: x[index_b], rollout)
        value, metrics, grads = optim.gradients(loss, state.params, mb, c.optim.accumulate, weight)
        state, norm = optim.update(tx, value, grads, state)
        return state, metrics | {"loss": value} | norm

    order_EB = jax.vmap(lambda k: jax.random.permutation(k, B))(jax.random.split(key, epochs))
    state, metrics = jax.lax.scan(minibatch, state, order_EB.reshape(epochs * c.minibatches, B // c.minibatches))
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, jax.tree.map(jnp.mean, metrics) | optim.left_out(state)


def train(
    run: Run,
    stage: str,
    c: Ppo | Rloo | Grpo,
    held: Roles,
    state: TrainState,
    policy: Callable[[Any], Top],
    learn: Learn,
    samples: int = 1,
) -> None:
    """Steps of sampling `samples` responses to each prompt of a batch and learning from them, and the stage's end.

    `policy` finds the policy in what is trained. Prompts reach `learn` as often as they have responses.
    """
    prompts = batches.prompt_batches(
        run.task.ppo_prompts,
        run.task.tokenizer,
        batch_size=c.batch_size,
        prompt_length=run.config.model.prompt_length,
        seed=run.seed(stage),
    )
    gen = policies.uncut(run, c.temperature)

    def step(state: TrainState, i: int) -> tuple[TrainState, dict]:
        batch = sharding.shard_step(prompts, i, run.mesh)
        draw_key, update_key = jax.random.split(run.key(stage, i))
        top, frozen = policy(state.params), held.fixed.frozen
        asked = batch.tokens_BP, batch.mask_BP, draw_key, samples
        drawn = sampling.sample(run.arch, gen, frozen, top, *asked, keep_trunk=True)
        given_B = None if held.elsewhere is None else jnp.asarray(held.elsewhere(batch, drawn, samples))
        batch = policies.repeated(batch, samples) if samples > 1 else batch
        state, metrics = learn(state, batch, drawn, given_B, update_key)
        logged = (i + 1) % c.loop.log_every == 0 or i + 1 == c.loop.steps
        extra = _gold(run, batch, drawn) | trunk_gap(run.arch, frozen, batch, drawn) if logged else {}
        return state, metrics | extra

    loop.run(
        stage=stage,
        title=run.title,
        directory=run.directory(stage),
        remote=run.remote,
        loop=c.loop,
        state=state,
        meta=run.meta(stage),
        step=step,
        ids=lambda i: batches.ids(run.task.ppo_prompts, batch_size=c.batch_size, seed=run.seed(stage))[i],
    )
    cut = batches.cut({"train": run.task.ppo_prompts}, run.task.tokenizer, **run.lengths)
    run.finish(stage, {"steps": c.loop.steps, "prompts": len(run.task.ppo_prompts)} | cut)


@partial(jax.jit, static_argnames=("arch",))
def trunk_gap(arch: model.Architecture, frozen: Frozen, prompts: PromptBatch, drawn: Sample) -> dict[str, jax.Array]:
    """How far the sampler's states of the first row are from those of one pass, in shares of the largest of these."""
    if drawn.hidden_BTD is None:
        return {}
    hidden_BTD = drawn.hidden_BTD[:1]
    first, drawn = jax.tree.map(lambda x: x[:1], (prompts, drawn))
    rows = policies.joined(first, drawn, 1)
    real_BT1 = rows[1][..., None] > 0
    once_BTD = jnp.where(real_BT1, model.trunk(arch, frozen, *rows), 0).astype(jnp.float32)
    gap_BTD = once_BTD - jnp.where(real_BT1, hidden_BTD, 0)
    return {"trunk_gap": jnp.abs(gap_BTD).max() / jnp.abs(once_BTD).max()}


def _gold(run: Run, batch: PromptBatch, drawn: Sample) -> dict[str, Any]:
    """The true reward of a rollout, where the task knows it: what over-optimisation is seen by."""
    if run.task.gold is None:
        return {}
    texts = policies.decode(run, drawn.tokens_BR, drawn.mask_BR)
    index_B, finished_B = (sharding.to_host(x).tolist() for x in (batch.index_B, drawn.finished_B))
    rows = zip(index_B, texts, finished_B, strict=True)
    return {"gold": float(np.mean([run.task.gold(run.task.ppo_prompts[i]["facts"], t, f) for i, t, f in rows]))}
