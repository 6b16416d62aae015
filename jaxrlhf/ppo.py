"""PPO with a KL penalty to the SFT policy: sample, score, update.

Policy, reference, reward model and value share one frozen trunk. It runs once a rollout; its hidden states stay in the
Rollout, so that the epochs touch TOP only.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import loop, losses, model, optim, policies, sampling, scoring, sharding
from jaxrlhf.config import Ppo
from jaxrlhf.data import batches
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError
from jaxrlhf.reward import new_head
from jaxrlhf.types import ActorCritic, Fixed, Frozen, PromptBatch, Rollout, Sample, ScalarHead, Scorer, TrainState

Metrics = dict[str, jax.Array]


def read_policy(
    arch: model.Architecture,
    frozen: Frozen,
    policy: ActorCritic,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
    responses: int,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and value [B, R] at the last `responses` tokens, from the trunk's hidden states.

    The value of a token is read before it is seen, where its log-probability is. Without `entropy_gradient`, the
    entropy has none.
    """
    before = slice(-responses - 1, -1)
    final_BRD = model.run_top(arch, policy.top, token_BT, hidden_BTD, mask_BT, lambda x: x[:, before])
    logits, target_BR = partial(model.logits, arch, frozen, policy.top), token_BT[:, -responses:]
    if frozen.embed and not entropy_gradient:
        logp_BR, entropy_BR = losses.head_logp(logits, final_BRD, target_BR, temperature)
    else:
        logp_BR, entropy_BR = losses.token_logp(logits(final_BRD), target_BR, temperature)
    value_BR = final_BRD.astype(jnp.float32) @ policy.value.w_D + policy.value.b
    return logp_BR, entropy_BR, value_BR


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
) -> tuple[Rollout, Metrics]:
    """One pass of the trunk for all four roles, then token rewards and generalised advantages.

    `given_score_B` holds the scores where the reward model comes from elsewhere, with a trunk of its own.
    """
    R = drawn.tokens_BR.shape[1]
    token_BT = jnp.concatenate([prompts.tokens_BP, drawn.tokens_BR], 1)
    mask_BT = jnp.concatenate([prompts.mask_BP, drawn.mask_BR], 1)
    mask_BR, length_B = drawn.mask_BR, drawn.mask_BR.sum(-1)
    hidden_BTD = model.trunk(arch, fixed.frozen, token_BT, mask_BT)
    read = partial(
        read_policy,
        arch,
        fixed.frozen,
        token_BT=token_BT,
        hidden_BTD=hidden_BTD,
        mask_BT=mask_BT,
        responses=R,
        temperature=c.temperature,
    )
    logp_BR, entropy_BR, value_BR = read(policy)
    ref_logp_BR, _, _ = read(ActorCritic(top=fixed.ref, value=policy.value))
    if fixed.scorer is None:
        assert given_score_B is not None
        model_score_B = given_score_B
    else:
        model_score_B = policies.read_out(arch, fixed.scorer, token_BT, hidden_BTD, mask_BT)
    score_B = losses.score_penalties(model_score_B, length_B, drawn.finished_B, c, R)
    kl_BR = losses.kl(logp_BR, ref_logp_BR, c.kl_estimator)
    reward_BR = losses.token_rewards(score_B, kl_BR, mask_BR, kl_coef)
    if c.whiten_rewards:
        reward_BR = losses.masked_whiten(reward_BR, mask_BR, shift_mean=False)
    advantage_BR, return_BR = losses.gae(reward_BR, value_BR, mask_BR, c.gamma, c.lam)
    explained = losses.explained_variance(value_BR, return_BR, mask_BR)
    if c.whiten_advantages:
        advantage_BR = losses.masked_whiten(advantage_BR, mask_BR)
    rollout = Rollout(
        tokens_BT=token_BT,
        mask_BT=mask_BT,
        response_mask_BR=mask_BR,
        hidden_BTD=hidden_BTD,
        logp_BR=logp_BR,
        ref_logp_BR=ref_logp_BR,
        value_BR=value_BR,
        score_B=score_B,
        advantage_BR=advantage_BR,
        return_BR=return_BR,
    )
    metrics = {
        "score": model_score_B.mean(),
        "score_with_penalties": score_B.mean(),
        "kl": (losses.kl(logp_BR, ref_logp_BR, "k1") * mask_BR).sum(-1).mean(),  # nats a response
        "kl_coef": kl_coef,
        "length": length_B.mean(),
        "finished": drawn.finished_B.astype(jnp.float32).mean(),
        "rollout_entropy": losses.masked_mean(entropy_BR, mask_BR),
        "return": losses.masked_mean(return_BR, mask_BR),
        "explained_variance": explained,
        # The sampler decodes token by token, the scorer in one pass: the gap is rounding, or a bug.
        "sampler_gap": jnp.abs((logp_BR - drawn.logp_BR) * mask_BR).max(),
    }
    return rollout, metrics


@partial(jax.jit, static_argnames=("arch", "tx", "c"), donate_argnames=("state",))
def update(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    c: Ppo,
    state: TrainState,
    frozen: Frozen,
    rollout: Rollout,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Epochs of minibatch steps on TOP and value head; every response is visited exactly once an epoch."""
    B, R = rollout.response_mask_BR.shape

    def loss(policy: ActorCritic, mb: Rollout) -> tuple[jax.Array, Metrics]:
        logp_BR, entropy_BR, value_BR = read_policy(
            arch,
            frozen,
            policy,
            mb.tokens_BT,
            mb.hidden_BTD,
            mb.mask_BT,
            R,
            c.temperature,
            entropy_gradient=c.entropy_coef != 0,
        )
        return losses.ppo_loss(
            logp_BR,
            value_BR,
            entropy_BR,
            mb.logp_BR,
            mb.value_BR,
            mb.advantage_BR,
            mb.return_BR,
            mb.response_mask_BR,
            c,
        )

    def minibatch(carry: tuple, index_b: jax.Array) -> tuple[tuple, Metrics]:
        params, opt_state = carry
        mb = jax.tree.map(lambda x: x[index_b], rollout)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, mb)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), metrics | {"loss": value, "grad_norm": optax.global_norm(grads)}

    order_EB = jax.vmap(lambda k: jax.random.permutation(k, B))(jax.random.split(key, c.epochs))
    carry, metrics = jax.lax.scan(
        minibatch, (state.params, state.opt_state), order_EB.reshape(c.epochs * c.minibatches, B // c.minibatches)
    )
    kl = ((rollout.logp_BR - rollout.ref_logp_BR) * rollout.response_mask_BR).sum(-1).mean()
    kl_coef = state.kl_coef
    if c.kl_target and kl_coef is not None:
        kl_coef = losses.adapt_kl_coef(kl_coef, kl, c.kl_target, c.kl_horizon, B)
    state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        step=state.step + 1, params=carry[0], opt_state=carry[1], kl_coef=kl_coef
    )
    return state, jax.tree.map(jnp.mean, metrics)


def ppo(run: Run) -> None:
    """Trains the policy from SFT against the reward model, with one frozen trunk for all four roles."""
    c = run.config.ppo
    _check(run, c)
    prompts = batches.prompt_batches(
        run.task.ppo_prompts,
        run.task.tokenizer,
        batch_size=c.batch_size,
        prompt_length=run.config.model.prompt_length,
        seed=run.seed("ppo"),
    )
    tokenizer = run.task.tokenizer
    gen = sampling.Generation(
        max_tokens=run.config.model.response_length,
        temperature=c.temperature,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    reward = scoring.of_run(run)
    elsewhere = None if isinstance(reward, Scorer) else scoring.scored_by(run, reward)
    fixed = Fixed(frozen=run.base[0], ref=run.policy("sft"), scorer=reward if isinstance(reward, Scorer) else None)
    tx = optim.optimizer(c.optim, c.loop.steps * c.epochs * c.minibatches)
    start = jax.tree.map(jnp.copy, ActorCritic(top=fixed.ref, value=_value_head(run, fixed)))
    state = optim.new_state(tx, start, run.mesh, kl_coef=jnp.float32(c.kl_coef))

    def step(state: TrainState, i: int) -> tuple[TrainState, dict]:
        batch = cast(PromptBatch, sharding.shard_batch(prompts[i], run.mesh))
        draw_key, update_key = jax.random.split(run.key("ppo", i))
        drawn = sampling.sample(run.arch, gen, fixed.frozen, state.params.top, batch.tokens_BP, batch.mask_BP, draw_key)
        given_B = None if elsewhere is None else jnp.asarray(elsewhere(batch, drawn, 1))
        rollout, seen = score(run.arch, c, fixed, state.params, state.kl_coef, batch, drawn, given_B)
        state, learnt = update(run.arch, tx, c, state, fixed.frozen, rollout, update_key)
        logged = (i + 1) % c.loop.log_every == 0 or i + 1 == c.loop.steps
        return state, seen | learnt | (_gold(run, batch, drawn) if logged else {})

    state = loop.run(
        stage="ppo",
        title=run.title,
        directory=run.directory("ppo"),
        loop=c.loop,
        state=state,
        meta=run.meta,
        step=step,
    )
    cut = batches.cut({"train": run.task.ppo_prompts}, tokenizer, **run.lengths)
    run.finish("ppo", {"steps": c.loop.steps, "prompts": len(run.task.ppo_prompts)} | cut)


def _check(run: Run, c: Ppo) -> None:
    sharding.check_divides("config.ppo.batch_size", c.batch_size, run.mesh)
    if c.batch_size % c.minibatches:
        raise UserError(
            f"config.ppo.batch_size={c.batch_size} does not divide into config.ppo.minibatches={c.minibatches}; "
            f"{c.batch_size // c.minibatches * c.minibatches or c.minibatches} would"
        )
    if c.kl_estimator not in ("k1", "k2", "k3"):
        raise UserError(f"config.ppo.kl_estimator={c.kl_estimator!r}: known are k1, k2, k3")
    if c.value_init not in ("zero", "normal", "reward"):
        raise UserError(f"config.ppo.value_init={c.value_init!r}: known are zero, normal, reward")
    if c.temperature <= 0:
        raise UserError(f"config.ppo.temperature={c.temperature}: rollouts are sampled, so it must be above 0")


def _value_head(run: Run, fixed: Fixed) -> ScalarHead:
    if fixed.scorer is not None and run.config.ppo.value_init == "reward":
        return fixed.scorer.head
    return new_head(run) if run.config.ppo.value_init == "normal" else run.head()


def _gold(run: Run, batch: PromptBatch, drawn: Sample) -> dict[str, float]:
    """The true reward of a rollout, where the task knows it: what over-optimisation is seen by."""
    if run.task.gold is None:
        return {}
    texts = policies.decode(run, drawn.tokens_BR, drawn.mask_BR)
    rows = zip(np.asarray(batch.index_B).tolist(), texts, np.asarray(drawn.finished_B).tolist(), strict=True)
    return {"gold": float(np.mean([run.task.gold(run.task.ppo_prompts[i]["facts"], t, f) for i, t, f in rows]))}
