"""Log-probabilities under the output head, without all logits at once.

A few positions are taken at a time: their logits are made, read, and turned into gradients while they are there. In
logits z with p = softmax(z / temperature), the gradient of log p at the target is (target's one-hot - p) / temperature.
On several devices a trained head is read at once, as its gradient would be added up over them for each lot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import losses, model
from jaxrlhf.types import Frozen, Params, Top

LOGITS = 2**24  # at a time on a device (64 MB), or one position of each row
POSITIONS = 1024  # at least, where the head is trained: its whole gradient is added to once for each lot of them
Head = tuple[Params, Params]  # of embeddings and output head what logits are made with, as far as it is trained


def logp(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    final_BRD: jax.Array,
    target_BR: jax.Array,
    temperature: float = 1.0,
    width: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """`losses.token_logp` of the logits of `final_BRD`: two f32 [B, R]. The entropies have no gradient.

    Under a frozen head, the slope of each log-probability with respect to its own final state is kept, so that the
    backward pass is a multiplication; under a trained one, lots' logits are made once more. `width` positions of a row
    are taken at a time; 0 = as many as memory suggests.
    """
    head, read = _head(arch, top), partial(_read, arch, frozen, temperature)
    trained = bool(jax.tree.leaves(head))
    lots = _lots(arch, trained, final_BRD, width)
    if trained and lots == 1:  # nothing is saved by making them twice
        logits_BRV = model.logits(arch, frozen, top, final_BRD)
        logp_BR, entropy_BR = losses.token_logp(logits_BRV, target_BR, temperature)
        return logp_BR, jax.lax.stop_gradient(entropy_BR)
    part = jax.custom_vjp(lambda *x: read(*x)[0])

    def kept_slope(*x: Any) -> tuple[Any, jax.Array]:
        found, slope = read(*x)
        return found, slope(jnp.ones(x[2].shape, jnp.float32))[1]

    if trained:
        part.defvjp(lambda *x: (read(*x)[0], x), lambda x, grads: (*read(*x)[1](grads[0]), None))
    else:
        part.defvjp(kept_slope, lambda slope, grads: (head, (grads[0][..., None] * slope).astype(slope.dtype), None))
    if lots == 1:
        return part(head, final_BRD, target_BR)
    found = jax.lax.map(lambda x: part(head, *x), _divided((final_BRD, target_BR), lots))
    logp_BR, entropy_BR = (_together(x)[:, : target_BR.shape[1]] for x in found)
    return logp_BR, entropy_BR


def weighted_logp(
    arch: model.Architecture,
    frozen: Frozen,
    top: Top,
    final_BRD: jax.Array,
    target_BR: jax.Array,
    weight_BR: jax.Array,
    width: int = 0,
) -> jax.Array:
    """sum(weight * log p) at the targets, f32; weights are 0 or more, and have no gradient.

    As they are known beforehand, each lot's gradient is made beside its value, from the same logits. What stands where
    they are 0 changes neither value nor gradient, so long as it is finite.
    """
    head, read = _head(arch, top), partial(_read, arch, frozen, 1.0)
    lots = _lots(arch, bool(jax.tree.leaves(head)), final_BRD, width)
    lots_read = _lots(arch, False, final_BRD, width)  # without a gradient

    def value(head: Head, final_BrD: jax.Array, target_Br: jax.Array, weight_Br: jax.Array) -> tuple[jax.Array, Any]:
        (logp_Br, _), slope = read(head, final_BrD, target_Br)
        return (jnp.where(weight_Br > 0, logp_Br, 0.0) * weight_Br).sum(), slope

    @jax.custom_vjp
    def total(head: Head, *rows: jax.Array) -> jax.Array:
        if lots_read == 1:
            return value(head, *rows)[0]
        return jax.lax.map(lambda x: value(head, *x)[0], _divided(rows, lots_read)).sum()

    def both(head: Head, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, Head, jax.Array]:
        found, slope = value(head, *rows)
        return found, *slope(rows[2])

    def forward(head: Head, *rows: jax.Array) -> tuple[jax.Array, Any]:
        if lots == 1:
            found, head_grad, final_grad = both(head, rows)
            return found, (head_grad, final_grad)

        def add(sums: Any, rows: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
            *found, final_grad = both(head, rows)
            return jax.tree.map(jnp.add, sums, tuple(found)), final_grad

        zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, head)
        (found, head_grad), final_grad = jax.lax.scan(add, zero, _divided(rows, lots))
        return found, (head_grad, _together(final_grad)[:, : rows[1].shape[1]])

    def backward(kept: Any, grad: jax.Array) -> tuple[Any, ...]:
        return *jax.tree.map(lambda x: (grad * x).astype(x.dtype), kept), None, None

    total.defvjp(forward, backward)
    return total(head, final_BRD, target_BR, weight_BR.astype(jnp.float32))


def _head(arch: model.Architecture, top: Top) -> Head:
    read = ("tokens", "project_out") if arch.tied else ("project_out",)
    return {k: top.embed[k] for k in read if k in top.embed}, top.lm_head


def _read(
    arch: model.Architecture, frozen: Frozen, temperature: float, head: Head, final_BrD: jax.Array, target_Br: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Callable[[jax.Array], tuple[Head, jax.Array]]]:
    """Log-probabilities and entropies [B, r]; and from cotangents of the former [B, r], those of head and states."""
    B, r, D = final_BrD.shape

    def logits(head: Head, final_MD: jax.Array) -> jax.Array:
        return model.logits(arch, frozen, Top(embed=head[0], blocks={}, final_norm={}, lm_head=head[1]), final_MD)

    # As one matrix: products with a batch axis are slower on CPUs, above all those that sum over it.
    logits_MV, pull = jax.vjp(logits, head, model.by_rows(final_BrD.reshape(B * r, D)))
    target_M = target_Br.reshape(B * r)
    logp_M, entropy_M = losses.token_logp(logits_MV, target_M, temperature)

    def slope(grad_Br: jax.Array) -> tuple[Head, jax.Array]:
        hit_MV = jnp.arange(logits_MV.shape[-1]) == target_M[:, None]
        p_MV, grad_M1 = jax.nn.softmax(logits_MV / temperature, -1), grad_Br.reshape(B * r, 1) / temperature
        head_grad, final_MD = pull(jnp.where(grad_M1 == 0, 0.0, grad_M1 * (hit_MV - p_MV)))
        return head_grad, final_MD.reshape(B, r, D)

    return (logp_M.reshape(B, r), entropy_M.reshape(B, r)), slope


def _lots(arch: model.Architecture, trained: bool, final_BRD: jax.Array, width: int) -> int:
    """In how many lots the positions are taken."""
    B, R, _ = final_BRD.shape
    mesh, V = jax.sharding.get_abstract_mesh(), arch.vocab_size
    if not width and trained and mesh.size > 1:
        return 1
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    devices = (1 if B % model.ways() else model.ways()) * (1 if V % tensor else tensor)
    positions = max(LOGITS * devices // V, POSITIONS if trained else 0)
    return max(-(-R // (width or max(positions // max(B, 1), 1))), 1)


def _divided(rows: Any, lots: int) -> Any:
    """Arrays [B, R, ...] as [lots, B, r, ...], with zeros at the end where `lots` does not divide R."""

    def divide(x: jax.Array) -> jax.Array:
        r = -(-x.shape[1] // lots)
        x = jnp.pad(x, ((0, 0), (0, lots * r - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], lots, r, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(divide, rows)


def _together(x_LBr: jax.Array) -> jax.Array:
    lots, B, r = x_LBr.shape[:3]
    return x_LBr.swapaxes(0, 1).reshape(B, lots * r, *x_LBr.shape[3:])
