"""Attention on TPUs by JAX's splash attention, which keeps no scores (Dao et al. 2022), with masks of our own.

Its masks are static, or known by each query's and key's segment alone, or held whole. Continuations that see their text
but not each other need more than the second, and the third is as long as the scores. So each query brings a code along.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as upstream
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from jaxrlhf.architecture import Architecture

_BITS = 13  # of a position in a code
# Bytes of a layer's f32 scores on a device. Fewer can lie in a TPU's own memory all the while: on a v5e, by its
# compiler, an SFT step with 23 MB of them moves 2.3 times as much with the kernel, whose arrays are padded, as without;
# one with 100 MB moves 1.7 times less.
_LEAST = 2**26


def fits(arch: Architecture, q_BTHK: jax.Array, k_BSGK: jax.Array) -> bool:
    """Whether these are whole sequences in bf16, enough to gain, which the mesh divides and no window cuts."""
    (B, T, H, _), (_, S, G, _), mesh = q_BTHK.shape, k_BSGK.shape, jax.sharding.get_abstract_mesh()
    scores = 4 * B * H * T * T
    if q_BTHK.dtype != jnp.bfloat16 or T != S or not 256 <= T <= 2**_BITS or any(0 < w < T for w in arch.windows):
        return False
    if mesh.empty:  # arrays may lie on several devices all the same, and GSPMD cannot divide a kernel
        return jax.device_count() == 1 and scores >= _LEAST
    ways, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    return not (B % ways or H % tensor or G % tensor) and scores >= _LEAST * ways * tensor


def attention(
    arch: Architecture,
    kept: str,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_BTT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """What `jaxrlhf.attention.plain` returns, where a query sees all keys from a first one to itself, but for one gap.

    So it is in rows of packed texts, and of texts with continuations. `interpret` runs the kernel on a CPU.
    """
    own = partial(_own, arch, kept, interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return own(q_BTHK, k_BTGK, v_BTGK, mask_BTT)
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
    divided = jax.shard_map(own, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return divided(q_BTHK, k_BTGK, v_BTGK, mask_BTT)


def _own(
    arch: Architecture,
    kept: str,
    interpret: bool,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_BTT: jax.Array,
) -> jax.Array:
    """The rows and heads of one device."""
    T, H = q_BTHK.shape[1:3]
    block = 128 * -(-T // (128 * -(-T // 640)))  # the fewest blocks, padded the least
    after = -T % block
    q_BTHK = (q_BTHK.astype(jnp.float32) * arch.query_scale).astype(q_BTHK.dtype)
    q_BHTK, k_BGTK, v_BGTK = (
        jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)
    )
    text_BT, gap_BT = _codes(mask_BTT)
    # What it is padded to is a text of its own, whose every query sees itself.
    text_BT = jnp.pad(text_BT, ((0, 0), (0, after)), constant_values=T)
    block_T = jnp.arange(T + after, dtype=jnp.int32) // block
    code_BT = jnp.pad(gap_BT, ((0, 0), (0, after))) | block_T << 2 * _BITS
    infos, options = _causal(H, T + after, block)
    options |= {"attn_logits_soft_cap": arch.attn_softcap or None, "interpret": interpret}
    options |= {"mask_function": _seen, "residual_checkpoint_name": kept}

    def row(q_HTK: jax.Array, k_GTK: jax.Array, v_GTK: jax.Array, text_T: jax.Array, code_T: jax.Array) -> Any:
        kernel = upstream.SplashAttentionKernel(*(i._replace(q_sequence=code_T) for i in infos), **options)
        return kernel(q_HTK, k_GTK, v_GTK, upstream.SegmentIds(q=text_T, kv=text_T))

    return jax.vmap(row)(q_BHTK, k_BGTK, v_BGTK, text_BT, code_BT).swapaxes(1, 2)[:, :T]


def _codes(mask_BTT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first key that each query sees, which is its text's, and where the gap starts and stops, as in `_seen`."""
    T = mask_BTT.shape[-1]
    at_T = jnp.arange(T, dtype=jnp.int32)
    first_BT = jnp.where(mask_BTT, at_T, T - 1).min(-1)
    gap_BTT = ~mask_BTT & (first_BT[..., None] <= at_T) & (at_T <= at_T[:, None])
    start_BT = jnp.where(gap_BTT, at_T, T - 1).min(-1)
    stop_BT = jnp.where(gap_BTT, at_T + 1, 0).max(-1)
    return first_BT, start_BT | stop_BT << _BITS


def _seen(code: jax.Array, key: jax.Array) -> jax.Array:
    """Which keys queries of these codes see, where they are of one text: a block of queries by fewer keys, or across.

    A code is where the query's gap starts, where it stops, and the number of its block.
    """
    block, axis = max((n, i) for i, n in enumerate(code.shape))
    query = (code >> 2 * _BITS) * block + jax.lax.broadcasted_iota(jnp.int32, code.shape, axis)
    most = 2**_BITS - 1
    return (key <= query) & ~((key >= (code & most)) & (key < (code >> _BITS & most)))


def _causal(heads: int, length: int, block: int) -> tuple[list[Any], dict[str, Any]]:
    """Which blocks the kernel leaves out, forward and for gradients, as no query looks ahead, and other options."""
    keys = 256 if block == 512 else 128  # fewer than queries, by which `_seen` tells them apart
    sizes = upstream.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=keys,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=keys,
        block_q_dq=block,
        block_kv_dq=keys,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    kernel = upstream.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return [kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info], dict(kernel.kwargs)
