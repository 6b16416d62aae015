"""AdamW and its schedule, the state that a stage starts from, and the update that leaves out what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf import sharding
from jaxrlhf.config import Optim
from jaxrlhf.types import TrainState

IN_A_ROW = 3  # updates left out one after another that stop a run


def schedule(c: Optim, steps: int) -> optax.Schedule:
    """The learning rate at each of `steps` optimizer steps: a linear warm-up, then constant or down to 0."""
    rest = max(steps - c.warmup, 1)
    shapes = {
        "constant": optax.constant_schedule(c.lr),
        "linear": optax.linear_schedule(c.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(c.lr, rest),
    }
    if not c.warmup:
        return shapes[c.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, c.lr, c.warmup), shapes[c.schedule]], [c.warmup])


def optimizer(c: Optim, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on clipped gradients, its moments in f32."""
    adam = optax.adamw(schedule(c, steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adam) if c.clip_norm else adam


def of_each(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for each of the models that are stacked on the leading axis: own moments, own gradient norm."""
    return optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))


def new_state(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, kl_coef: jax.Array | None = None
) -> TrainState:
    """Step 0 of a stage that trains `params`; the state owns its arrays, since steps donate it."""

    def make(params: Any, kl_coef: jax.Array | None) -> TrainState:
        return fresh(tx, jax.tree.map(jnp.copy, params), kl_coef)

    # One program, not one a shape. The trained tree's paths end alike in Adam's moments, so one table serves both.
    where = sharding.layout(jax.eval_shape(make, params, kl_coef), mesh)
    return jax.jit(make, out_shardings=where)(params, kl_coef)


def fresh(tx: optax.GradientTransformation, params: Any, kl_coef: jax.Array | None = None) -> TrainState:
    """The same from `params` themselves, wherever they are."""
    counts = {"step": jnp.int32(0), "skipped": jnp.int32(0), "in_a_row": jnp.int32(0)}
    return TrainState(params=params, opt_state=tx.init(params), kl_coef=kl_coef, **counts)


def gradients(
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: Any,
    batch: Any,
    parts: int,
    weight: Callable[[Any], jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss, metrics and gradient of a batch [B, ...], of which `parts` micro-batches are worked through one by one.

    All three are means over micro-batches that count by `weight`, what the loss divides by (tokens, where it is a mean
    over tokens), which is the mean over the whole batch. `parts` divides B.
    """
    one = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = one(params, batch)
        return value, metrics, grads
    micro = apart(batch, parts)
    weights_A = jax.vmap(weight)(micro).astype(jnp.float32)
    share_A = weights_A / jnp.maximum(weights_A.sum(), 1e-30)

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        found = one(params, part[0])
        return jax.tree.map(lambda t, x: t + part[1] * x, total, found), None

    shapes = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((value, metrics), grads), _ = jax.lax.scan(add, zeros, (micro, share_A))
    return value, metrics, grads


def apart(batch: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]; `parts` divides B, and [B, 0] has parts too."""
    # Every `parts`-th row, so that the rows of each micro-batch are spread over the devices as those of the batch are,
    # and each member of an ensemble has as many.
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def update(
    tx: optax.GradientTransformation, loss: jax.Array, grads: Any, state: TrainState
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one optimizer step, its `step` apart, and the gradient's norm.

    Where the loss or the gradient's norm is not finite, parameters and optimizer stay as they are, to the bit, and the
    update is counted as left out. After `IN_A_ROW` of these nothing changes any more: the run is to be stopped.
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.in_a_row < IN_A_ROW)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new, old = (optax.apply_updates(state.params, updates), opt_state), (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + jnp.where(good, 0, 1),
        in_a_row=jnp.where(good, 0, state.in_a_row + 1),
    )
    return state, {"grad_norm": norm}


def left_out(state: TrainState) -> dict[str, jax.Array]:
    """The counts of updates left out, as metrics that outlive the state."""
    return {"skipped": state.skipped, "in_a_row": state.in_a_row}
