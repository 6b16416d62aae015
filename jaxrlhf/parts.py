"""Rows worked through some at a time, so that what is made on the way takes less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from jaxrlhf import model

Rows = TypeVar("Rows")
Tree = TypeVar("Tree")


def in_parts(look_at: Callable[[Rows], Tree], rows: Rows, parts: int) -> Tree:
    """`look_at` of arrays [B, ...] in `parts`; at once where the mesh divides parameters, or a part's rows unevenly."""
    B, W = len(jax.tree.leaves(rows)[0]), model.ways()
    # Each part would gather the parameters anew, and rows that do not divide lie whole on every device.
    if parts == 1 or model.gathers() or B % (parts * W):
        return look_at(rows)
    b = B // (parts * W)

    def apart(x: jax.Array) -> jax.Array:  # each device's own rows, in their order: on one device, nothing is moved
        return x.reshape(W, parts, b, *x.shape[1:]).swapaxes(0, 1).reshape(parts, W * b, *x.shape[1:])

    def together(x: jax.Array) -> jax.Array:
        return x.reshape(parts, W, b, *x.shape[2:]).swapaxes(0, 1).reshape(B, *x.shape[2:])

    return jax.tree.map(together, jax.lax.map(look_at, jax.tree.map(apart, rows)))
