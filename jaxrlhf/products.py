"""Products with a matrix of parameters, whose gradient is taken as CPUs take it fastest."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax

Kept = tuple[jax.Array | None, jax.Array | None]  # an input and a matrix, each where the other has a gradient


def platform() -> str:
    """What the arrays lie on: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    # The mesh knows its devices, also where a step is compiled for some that are not there.
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def dot_general(
    x: jax.Array, w: jax.Array, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> jax.Array:
    """`jax.lax.dot_general` as Flax's layers call it; on CPUs with the gradient below.

    There, the last axes of `x` are multiplied with the first of `w`, and nothing else is asked for.
    """
    (of_x, of_w), (batch, _) = dimension_numbers
    n = len(of_x)
    if platform() != "cpu" or batch or of_w != tuple(range(n)) or of_x != tuple(range(x.ndim - n, x.ndim)):
        return jax.lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type)
    width = math.prod(w.shape[:n])
    rows = x.shape[: x.ndim - n]
    out: Any = _product(preferred_element_type, x.reshape(*rows, width), w.reshape(width, -1))
    return out.reshape(*rows, *w.shape[n:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype: Any, x: jax.Array, w_KN: jax.Array) -> jax.Array:
    return _plain(dtype, x, w_KN)


def _plain(dtype: Any, x: jax.Array, w_KN: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w_KN, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def _forward(dtype: Any, x: Any, w_KN: Any) -> tuple[jax.Array, Kept]:
    kept = x.value if w_KN.perturbed else None, w_KN.value if x.perturbed else None
    return _plain(dtype, x.value, w_KN.value), kept  # not `_product`, which `model.REMAT` would not know to keep


def _backward(dtype: Any, kept: Kept, grad: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """XLA's fast products on CPUs sum over the last axis of their left side alone; others take up to twice as long.

    The gradient of the matrix sums over the first axis of both, so the narrower side is copied, transposed, for it.
    """
    x, w_KN = kept
    dx = dw_KN = None
    if not isinstance(grad, jax.Array):  # a symbolic zero
        return dx, dw_KN
    if w_KN is not None:
        dx = _plain(grad.dtype, grad, w_KN.T).astype(w_KN.dtype)
    if x is not None:
        x_MK, grad_MN = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        apart = jax.lax.optimization_barrier  # or XLA takes the copy away
        if x_MK.shape[1] <= grad_MN.shape[1]:
            dw_KN = apart(_plain(grad.dtype, apart(x_MK.T), grad_MN))
        else:
            dw_KN = apart(_plain(grad.dtype, apart(grad_MN.T), x_MK)).T
        dw_KN = dw_KN.astype(x.dtype)
    return dx, dw_KN


_product.defvjp(_forward, _backward, symbolic_zeros=True)
