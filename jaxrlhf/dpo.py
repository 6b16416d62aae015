"""DPO and IPO: the policy from preference pairs, without a reward model, on the shared trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import head, loop, losses, model, optim, reward, sharding
from jaxrlhf.config import Dpo
from jaxrlhf.data import batches
from jaxrlhf.evaluation.statistics import mean_estimate
from jaxrlhf.experiment import Run
from jaxrlhf.types import CHOSEN, REJECTED, Frozen, PairBatch, SftBatch, Top, TrainState


def token_logp(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    """Log-probability [B, T] of each token after those before it in its text, from the trunk's states; 0 of a first."""
    final_BTD, before_BT = model.run_top(arch, top, token_BT, hidden_BTD, mask_BT), model.before(mask_BT)
    final_BTD = jnp.take_along_axis(final_BTD, jnp.maximum(before_BT, 0)[..., None], 1)
    logp_BT, _ = head.logp(arch, frozen, top, final_BTD, token_BT)
    return jnp.where(before_BT >= 0, logp_BT, 0.0)


def loss(
    arch: model.Architecture, c: Dpo, frozen: Frozen, ref: Top, top: Top, batch: PairBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`losses.dpo_loss` of pairs; the trunk runs once for policy and reference."""
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    rows = batch.tokens_BT, hidden_BTD, batch.mask_BT

    def sides(policy: Top) -> tuple[jax.Array, jax.Array]:
        logp_BT = token_logp(arch, frozen, policy, *rows)
        number_N1 = jnp.arange(1, 1 + batch.ends_BN2.shape[1])[:, None]
        chosen_BN, rejected_BN = (
            losses.sequence_logp(logp_BT[:, None], batch.mask_BT[:, None] == number_N1 + side)
            for side in (CHOSEN, REJECTED)
        )
        return chosen_BN, rejected_BN

    return losses.dpo_loss(*sides(top), *jax.lax.stop_gradient(sides(ref)), batch.pair_BN, c.beta, c.loss)


@partial(jax.jit, static_argnames=("arch", "tx", "c"), donate_argnames=("state",))
def step(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    c: Dpo,
    state: TrainState,
    frozen: Frozen,
    ref: Top,
    batch: PairBatch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on TOP, the batch in `c.optim.accumulate` micro-batches."""
    value, metrics, grads = optim.gradients(
        lambda top, rows: loss(arch, c, frozen, ref, top, rows),
        state.params,
        batch,
        c.optim.accumulate,
        lambda rows: rows.pair_BN.sum(),
    )
    state, norm = optim.update(tx, value, grads, state)
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics | norm | optim.left_out(state)


@partial(jax.jit, static_argnames=("arch",))
def _log_ratio(arch, frozen, ref, top, batch) -> jax.Array:
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    rows = batch.tokens_BT, hidden_BTD, batch.mask_BT
    ratio_BT = token_logp(arch, frozen, top, *rows) - token_logp(arch, frozen, ref, *rows)
    return losses.sequence_logp(ratio_BT, batch.weight_BT)


def implicit_rewards(run: Run, ref: Top, top: Top, records: Sequence, field: str) -> np.ndarray:
    """[N] beta * (logp - ref_logp) of the responses that records have in `field`, cut to fit as training cuts them."""
    size = run.config.sampling.batch_size
    examples = [r | {"response": r[field], "response_finished": r.get(f"{field}_finished", "1")} for r in records]

    def launch(given: tuple[SftBatch, int]) -> tuple[jax.Array, int]:
        batch, valid = given
        return _log_ratio(run.arch, run.base[0], ref, top, sharding.shard_batch(batch, run.mesh)), valid

    each = batches.eval_sft_batches(examples, run.task.tokenizer, batch_size=size, **run.lengths)
    found = [sharding.to_host(ratio_B)[:valid] for ratio_B, valid in sharding.ahead(launch, each)]
    return run.config.dpo.beta * np.concatenate([np.zeros(0, np.float32), *found])


def dpo(run: Run) -> None:
    """Trains the policy from SFT on the reward model's pairs; reports how it ranks every split's pairs."""
    c = run.config.dpo
    pairs = reward.preferences(run)
    reward.check_pairs(run, pairs)
    train_batches = batches.pair_batches(
        pairs["train"],
        run.task.tokenizer,
        batch_size=c.batch_size,
        seeds=[run.seed("dpo")],
        ways=sharding.ways(run.mesh) * c.optim.accumulate,
        **run.lengths,
    )
    tx = optim.optimizer(c.optim, c.loop.steps)
    frozen, ref = run.base[0], run.policy("sft")
    state = loop.run(
        stage="dpo",
        title=run.title,
        directory=run.directory("dpo"),
        remote=run.remote,
        loop=c.loop,
        state=optim.new_state(tx, ref, run.mesh),
        meta=run.meta("dpo"),
        step=lambda state, i: step(
            run.arch, tx, c, state, frozen, ref, sharding.shard_step(train_batches, i, run.mesh)
        ),
        ids=lambda i: batches.ids(pairs["train"], batch_size=c.batch_size, seed=run.seed("dpo"))[i],
        evaluate=lambda state: {
            f"accuracy_{s}": e["mean"] for s, e in _ranked(run, ref, state.params, pairs)["accuracy"].items()
        },
    )
    cut = batches.cut(pairs, run.task.tokenizer, **run.lengths, fields=("chosen", "rejected"))
    counts = {s: len(p) for s, p in pairs.items()}
    run.finish("dpo", {"steps": c.loop.steps, "pairs": counts} | _ranked(run, ref, state.params, pairs) | cut)


def _ranked(run: Run, ref: Top, top: Top, pairs: Mapping[str, Sequence]) -> dict[str, dict[str, Any]]:
    """The implicit reward's accuracy on every split but `train`, and its margin, chosen less rejected."""
    margins = reward.margins(pairs, lambda records, side: implicit_rewards(run, ref, top, records, side))
    found = reward.agreement(run, pairs, margins)
    return found | {"margin": {s: mean_estimate(m_B, run.config.evaluation.bootstrap) for s, m_B in margins.items()}}
