"""Products with a matrix of parameters, whose gradient is taken as CPUs take it fastest; I of inputs, O of outputs."""

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
    """`jax.lax.dot_general`; on CPUs with the gradient below, and then without forward-mode differentiation.

    So where the last axes of `x` are multiplied with the first of `w`, as Flax's layers do, or with the last of a
    matrix, as output heads do.
    """
    (of_x, of_w), (batch, _) = dimension_numbers
    n, last = len(of_x), w.ndim == 2 and of_w == (1,)
    ours = of_x == tuple(range(x.ndim - n, x.ndim)) and (last or of_w == tuple(range(n)))
    if platform() != "cpu" or not ours or batch or precision is not None or x.dtype != w.dtype:
        return jax.lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type)
    if last:
        return _product(preferred_element_type, 1, x, w)  # pyright: ignore[reportReturnType]
    rows, width = x.shape[: x.ndim - n], math.prod(w.shape[:n])
    out: Any = _product(preferred_element_type, 0, x.reshape(*rows, width), w.reshape(width, -1))
    return out.reshape(*rows, *w.shape[n:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(dtype: Any, axis: int, x: jax.Array, w: jax.Array) -> jax.Array:
    return _plain(dtype, axis, x, w)


def _plain(dtype: Any, axis: int, x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _forward(dtype: Any, axis: int, x: Any, w: Any) -> tuple[jax.Array, Kept]:
    kept = x.value if w.perturbed else None, w.value if x.perturbed else None
    return _plain(dtype, axis, x.value, w.value), kept  # not `_product`, which `model.REMAT` would not know to keep


def _backward(dtype: Any, axis: int, kept: Kept, grad: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """XLA's fast products on CPUs sum over the last axis of their left side alone; others take up to twice as long.

    The gradient of the matrix sums over the first axis of both, so the narrower side is copied, transposed, for it.
    """
    x, w = kept
    dx = dw = None
    if not isinstance(grad, jax.Array):  # a symbolic zero
        return dx, dw
    if w is not None:
        dx = _plain(grad.dtype, 1 - axis, grad, w).astype(w.dtype)
    if x is not None:
        x_MI, grad_MO = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        # Else XLA takes the copy away, and where the result is transposed turns the whole product round.
        apart = jax.lax.optimization_barrier
        if x_MI.shape[1] <= grad_MO.shape[1]:
            dw = apart(_plain(grad.dtype, 0, apart(x_MI.T), grad_MO))
        else:
            dw = apart(_plain(grad.dtype, 0, apart(grad_MO.T), x_MI)).T
        dw = (dw.T if axis else dw).astype(x.dtype)
    return dx, dw


_product.defvjp(_forward, _backward, symbolic_zeros=True)
