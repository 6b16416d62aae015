"""Next-token training: SFT on the top of the model, and the pretraining of a small base, which is the same step."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import head, loop, model, optim, sharding
from jaxrlhf.data import batches
from jaxrlhf.data.task import Records
from jaxrlhf.experiment import Run
from jaxrlhf.split import split
from jaxrlhf.types import Frozen, SftBatch, Top, TrainState


def loss(arch: model.Architecture, frozen: Frozen, top: Top, batch: SftBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum(w * -log p) / sum(w) of tokens given those before them, in nats, 0 where all w are; `tokens` is sum(w).

    Where the batch says what stands before them, the last block and the output head run on nothing else.
    """
    hidden_BTD = jax.lax.stop_gradient(model.trunk(arch, frozen, batch.tokens_BT, batch.mask_BT))
    next_BT, weight_BT = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch.tokens_BT, batch.weight_BT))
    pick, next_BQ, weight_BQ = None, next_BT, weight_BT.astype(jnp.float32)  # all, where nothing is picked
    if batch.before_BQ is not None:
        pick = partial(_at, batch.before_BQ)
        next_BQ, weight_BQ = pick(next_BQ), pick(weight_BQ)
    final_BQD = model.run_top(arch, top, batch.tokens_BT, hidden_BTD, batch.mask_BT, pick)
    tokens = weight_BQ.sum()
    total = head.weighted_logp(arch, frozen, top, final_BQD, next_BQ, weight_BQ)
    value = jnp.where(tokens > 0, -total / jnp.where(tokens > 0, tokens, 1.0), 0.0)
    return value, {"loss": value, "tokens": tokens}


def _at(place_BQ: jax.Array, x: jax.Array) -> jax.Array:
    """[B, Q, ...] of [B, T, ...]."""
    if place_BQ.shape[1] >= x.shape[1]:  # attention would take the picked queries for a whole sequence
        raise ValueError(f"before_BQ has {place_BQ.shape[1]} of {x.shape[1]} positions; it is for fewer than all")
    return jnp.take_along_axis(x, place_BQ.reshape(*place_BQ.shape, *(1,) * (x.ndim - 2)), 1)


@partial(jax.jit, static_argnames=("arch", "tx", "parts"), donate_argnames=("state",))
def step(
    arch: model.Architecture,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Frozen,
    batch: SftBatch,
    parts: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on TOP, the batch in `parts` micro-batches."""
    tokens = lambda rows: rows.weight_BT[:, 1:].sum()  # noqa: E731
    value, metrics, grads = optim.gradients(
        lambda top, rows: loss(arch, frozen, top, rows), state.params, batch, parts, tokens
    )
    state, norm = optim.update(tx, value, grads, state)
    state = state.replace(step=state.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return state, metrics | {"tokens": tokens(batch)} | norm | optim.left_out(state)


_evaluate = partial(jax.jit, static_argnames=("arch",))(
    lambda arch, frozen, top, batch: loss(arch, frozen, top, batch)[1]
)


def train(
    run: Run,
    stage: str,
    frozen: Frozen,
    top: Top,
    examples: Records,
    validation: Records,
    prompt_weight: float,
) -> None:
    """Trains `top` on examples of {prompt, response}, for `pretrain` and `sft` alike."""
    c = run.config.sft if stage == "sft" else run.config.pretrain
    train_batches = batches.sft_batches(
        examples,
        run.task.tokenizer,
        batch_size=c.batch_size,
        prompt_weight=prompt_weight,
        seed=run.seed(stage),
        ways=sharding.ways(run.mesh) * c.optim.accumulate,
        **run.lengths,
    )
    held_out = list(batches.eval_sft_batches(validation, run.task.tokenizer, batch_size=c.batch_size, **run.lengths))

    def evaluate(state: TrainState) -> dict[str, float]:
        def launch(given: tuple[SftBatch, int]) -> dict[str, jax.Array]:
            return _evaluate(run.arch, frozen, state.params, sharding.shard_batch(given[0], run.mesh))

        found = [(np.asarray(m["loss"]), np.asarray(m["tokens"])) for m in sharding.ahead(launch, held_out)]
        return {"validation_loss": sum(float(nats * n) for nats, n in found) / sum(float(n) for _, n in found)}

    tx = optim.optimizer(c.optim, c.loop.steps)
    state = loop.run(
        stage=stage,
        title=run.title,
        directory=run.directory(stage),
        remote=run.remote,
        loop=c.loop,
        state=optim.new_state(tx, top, run.mesh),
        meta=run.meta(stage),
        step=lambda state, i: step(
            run.arch, tx, state, frozen, sharding.shard_step(train_batches, i, run.mesh), c.optim.accumulate
        ),
        ids=lambda i: batches.ids(examples, batch_size=c.batch_size, seed=run.seed(stage))[i],
        evaluate=evaluate,
    )
    cut = batches.cut({"train": examples}, run.task.tokenizer, **run.lengths, fields=("response",))
    run.finish(stage, {"steps": c.loop.steps, "examples": len(examples)} | cut | evaluate(state))


def pretrain(run: Run) -> None:
    """The base model from scratch, everything trained; loss on the prompts too, at a lower weight."""
    frozen, top = split(model.init(run.arch, run.key("init")), 0)
    top = sharding.place(top, run.mesh)
    examples, held_out = run.task.documents(), run.task.held_out_documents()
    train(run, "pretrain", frozen, top, examples, held_out, run.config.pretrain.prompt_weight)


def sft(run: Run) -> None:
    """Supervised fine-tuning of TOP on demonstrations; loss on the prompt as `config.sft.prompt_weight` says."""
    frozen, top = run.base
    train(run, "sft", frozen, top, run.task.demonstrations, run.task.validation, run.config.sft.prompt_weight)
