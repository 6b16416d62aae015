"""Attention over whole sequences: on TPUs a kernel that keeps no scores, where one fits; elsewhere plain products.

What sees what is a mask [B, T, S], as `model.causal` makes it, on every path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrlhf import products
from jaxrlhf.architecture import Architecture

MASKED = -1e30  # finite, so that a row with every key masked (left padding) stays finite
KEPT = "attention"  # the name of what a kernel keeps for its gradients, for `model.REMAT`


def scaled(arch: Architecture, score: jax.Array) -> jax.Array:
    """Dot products of queries and keys as the softmax takes them."""
    return softcap(score * arch.query_scale, arch.attn_softcap)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Values squashed into (-cap, cap); 0 = as they are."""
    return cap * jnp.tanh(x / cap) if cap else x


def attention(
    arch: Architecture, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Scaled dot-product attention with grouped queries; softmax in f32. Returns [B, T, H, K].

    As many queries as keys are a whole sequence, of which none looks ahead, whatever the mask says.
    """
    if products.platform() == "tpu":
        from jaxrlhf import splash  # a tenth of a second that others need not wait

        if splash.fits(arch, q_BTHK, k_BSGK):
            return splash.attention(arch, KEPT, q_BTHK, k_BSGK, v_BSGK, mask_BTS)
    return plain(arch, q_BTHK, k_BSGK, v_BSGK, mask_BTS)


def plain(
    arch: Architecture, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """The same as two products with the scores between them; whole sequences are taken some queries at a time.

    Each such part is with the keys up to its last query.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    # Heads before positions: the products are then over whole matrices, which CPUs take twice as fast.
    q_BGQTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    parts = []
    for start, stop in _parts(T) if T == S else [(0, T)]:
        keys = stop if T == S else S
        mask_BTS1 = mask_BTS[:, None, None, start:stop, :keys]
        parts.append(_attend(arch, q_BGQTK[..., start:stop, :], k_BGSK[:, :, :keys], v_BGSK[:, :, :keys], mask_BTS1))
    return jnp.concatenate(parts, 3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _parts(length: int) -> list[tuple[int, int]]:
    """A sequence in four parts or fewer, of a multiple of 64 positions each but for the last."""
    size = 64 * -(-length // 256)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _attend(arch: Architecture, q_BGQTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask: jax.Array) -> jax.Array:
    score = scaled(arch, jnp.einsum("bgqtk,bgsk->bgqts", q_BGQTK, k_BGSK, preferred_element_type=jnp.float32))
    score = jnp.where(mask, score, MASKED)
    weight = jnp.exp(score - jax.lax.stop_gradient(score.max(-1, keepdims=True)))
    # Divided last: K numbers a query instead of S.
    out = jnp.einsum("bgqts,bgsk->bgqtk", weight.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=jnp.float32)
    return (out / weight.sum(-1, keepdims=True)).astype(v_BGSK.dtype)
