"""DPO and IPO: the policy from preference pairs, without a reward model, on the shared trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from jaxrlhf import loop, losses, model, optim, reward, sharding
from jaxrlhf.config import Dpo
from jaxrlhf.data import batches
from jaxrlhf.evaluation.statistics import mean_estimate
from jaxrlhf.experiment import Run
from jaxrlhf.types import Frozen, PairBatch, Top, TrainState


def response_logp(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
    weight_BT: jax.Array,
) -> jax.Array:
    """Log-probability [B] of each row's response, where `weight_BT` is 1, from the trunk's hidden states."""
    final_BTD = model.run_top(arch, top, token_BT, hidden_BTD, mask_BT)
    logits_BTV = model.logits(arch, frozen, top, final_BTD[:, :-1])
    return losses.sequence_logp(losses.token_logp(logits_BTV, token_BT[:, 1:])[0], weight_BT[:, 1:])


def loss(
    arch: model.Architecture, c: Dpo, frozen: Frozen, ref: Top, top: Top, batch: PairBatch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`losses.dpo_loss` of pairs; the trunk runs once for policy and reference."""
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    rows = batch.tokens_BT, hidden_BTD, batch.mask_BT, batch.weight_BT
    chosen_B, rejected_B = response_logp(arch, frozen, top, *rows).reshape(2, -1)
    ref_chosen_B, ref_rejected_B = jax.lax.stop_gradient(response_logp(arch, frozen, ref, *rows)).reshape(2, -1)
    return losses.dpo_loss(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, c.beta, c.loss)


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
    """One optimizer step on TOP."""
    grads, metrics = jax.grad(lambda top: loss(arch, c, frozen, ref, top, batch), has_aux=True)(state.params)
    state, norm = optim.update(tx, metrics["loss"], grads, state)
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics | norm | optim.left_out(state)


@partial(jax.jit, static_argnames=("arch",))
def _log_ratio(arch, frozen, ref, top, batch) -> jax.Array:
    hidden_BTD = model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT)
    rows = batch.tokens_BT, hidden_BTD, batch.mask_BT, batch.weight_BT
    return response_logp(arch, frozen, top, *rows) - response_logp(arch, frozen, ref, *rows)


def implicit_rewards(run: Run, ref: Top, top: Top, records: Sequence, field: str) -> np.ndarray:
    """[N] beta * (logp - ref_logp) of the responses that records have in `field`, cut to fit as training cuts them."""
    size, found = run.config.sampling.batch_size, [np.zeros(0, np.float32)]
    examples = [r | {"response": r[field], "response_finished": r.get(f"{field}_finished", "1")} for r in records]
    for batch, valid in batches.eval_sft_batches(examples, run.task.tokenizer, batch_size=size, **run.lengths):
        placed = sharding.shard_batch(batch, run.mesh)
        found.append(np.asarray(_log_ratio(run.arch, run.base[0], ref, top, placed))[:valid])
    return run.config.dpo.beta * np.concatenate(found)


def dpo(run: Run) -> None:
    """Trains the policy from SFT on the reward model's pairs; reports how it ranks every split's pairs."""
    c = run.config.dpo
    sharding.check_divides("config.dpo.batch_size", c.batch_size, run.mesh)
    pairs = reward.preferences(run)
    reward.check_pairs(run, pairs)
    train_batches = batches.pair_batches(
        pairs["train"], run.task.tokenizer, batch_size=c.batch_size, seed=run.seed("dpo"), **run.lengths
    )
    tx = optim.optimizer(c.optim, c.loop.steps)
    frozen, ref = run.base[0], run.policy("sft")
    state = loop.run(
        stage="dpo",
        title=run.title,
        directory=run.directory("dpo"),
        loop=c.loop,
        state=optim.new_state(tx, ref, run.mesh),
        meta=run.meta("dpo"),
        step=lambda state, i: step(
            run.arch, tx, c, state, frozen, ref, sharding.shard_batch(train_batches[i], run.mesh)
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
