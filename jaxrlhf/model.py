"""One decoder-only transformer: a family (OPT, LLaMA, GPT-2) is a row of options, not a class.

Axis letters, here and everywhere: B batch, P prompt, R response, T sequence (queries), S keys, D model width,
F feed-forward width, H heads, G key/value heads, K head width, V vocabulary, L layers, N samples a prompt.

Parameters are plain dicts, the blocks stacked on a leading layer axis and run by `lax.scan`. Flax Linen names and
initialises one block's parameters and is used nowhere else. Keys and values go in and out explicitly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrlhf.types import Frozen, Params, Top

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
MASKED = -1e30  # finite, so that a row with every key masked (left padding) stays finite


@dataclass(frozen=True)
class Architecture:
    """Sizes and options of a decoder; hashable, so that it can be static under `jit`."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    max_positions: int  # of learned positions; rotary ones have no limit
    norm: str  # rms | layer
    norm_eps: float
    positions: str  # rope | learned
    position_offset: int  # OPT's table starts two rows later
    rope_theta: float
    activation: str  # silu | relu | gelu_tanh
    gated: bool  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    bias: bool
    tied: bool  # the output head is the embedding table


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "norm": "rms",
        "norm_eps": 1e-5,
        "positions": "rope",
        "position_offset": 0,
        "rope_theta": 10_000.0,
        "activation": "silu",
        "gated": True,
        "bias": False,
        "tied": True,
    },
    "opt": {
        "norm": "layer",
        "norm_eps": 1e-5,
        "positions": "learned",
        "position_offset": 2,
        "rope_theta": 0.0,
        "activation": "relu",
        "gated": False,
        "bias": True,
        "tied": True,
    },
    "gpt2": {
        "norm": "layer",
        "norm_eps": 1e-5,
        "positions": "learned",
        "position_offset": 0,
        "rope_theta": 0.0,
        "activation": "gelu_tanh",
        "gated": False,
        "bias": True,
        "tied": True,
    },
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Norm(nn.Module):
    """Root-mean-square or layer normalisation over the last axis, in f32."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        x32 = x.astype(jnp.float32)
        if self.arch.norm == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.arch.norm_eps) * scale
        if self.arch.norm == "layer":
            x32 = x32 + self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        return x32.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and feed-forward. `attend(q, k, v)` decides what is attended to, and owns the cache."""

    arch: Architecture

    @nn.compact
    def __call__(self, h_BTD: jax.Array, position_BT: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        a = self.arch
        x = Norm(a, name="attn_norm")(h_BTD)
        q_BTHK = nn.DenseGeneral((a.heads, a.head_width), use_bias=a.bias, name="q")(x)
        k_BTGK = nn.DenseGeneral((a.kv_heads, a.head_width), use_bias=a.bias, name="k")(x)
        v_BTGK = nn.DenseGeneral((a.kv_heads, a.head_width), use_bias=a.bias, name="v")(x)
        if a.positions == "rope":
            q_BTHK, k_BTGK = rotate(q_BTHK, position_BT, a.rope_theta), rotate(k_BTGK, position_BT, a.rope_theta)
        out_BTHK, kept = attend(q_BTHK, k_BTGK, v_BTGK)
        h_BTD = h_BTD + nn.DenseGeneral(a.width, axis=(-2, -1), use_bias=a.bias, name="o")(out_BTHK)
        x = Norm(a, name="mlp_norm")(h_BTD)
        act = ACTIVATIONS[a.activation]
        up_BTF = nn.Dense(a.ff_width, use_bias=a.bias, name="up")(x)
        hidden_BTF = act(nn.Dense(a.ff_width, use_bias=a.bias, name="gate")(x)) * up_BTF if a.gated else act(up_BTF)
        return h_BTD + nn.Dense(a.width, use_bias=a.bias, name="down")(hidden_BTF), kept


def rotate(x_BTHK: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves paired as LLaMA's checkpoints have them."""
    half = x_BTHK.shape[-1] // 2
    frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1K = position_BT[..., None, None].astype(jnp.float32) * frequency_K
    cos, sin = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
    low, high = x_BTHK[..., :half].astype(jnp.float32), x_BTHK[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x_BTHK.dtype)


def attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Scaled dot-product attention with grouped queries; softmax in f32. Returns [B, T, H, K]."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q = q_BTHK.reshape(B, T, G, H // G, K)
    score = jnp.einsum("btgqk,bsgk->bgqts", q, k_BSGK, preferred_element_type=jnp.float32) * K**-0.5
    weight = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], score, MASKED), axis=-1)
    return jnp.einsum("bgqts,bsgk->btgqk", weight.astype(v_BSGK.dtype), v_BSGK).reshape(B, T, H, K)


def positions(mask_BT: jax.Array) -> jax.Array:
    """Positions of real tokens, counted from the first real one: left padding changes nothing. int32 [B, T]."""
    return jnp.maximum(jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1, 0)


def causal(mask_BT: jax.Array) -> jax.Array:
    """Which keys each query sees: real ones, not later than itself. bool [B, T, S]."""
    T = mask_BT.shape[-1]
    return jnp.tril(jnp.ones((T, T), jnp.bool_)) & (mask_BT > 0)[:, None, :]


def run_blocks(
    arch: Architecture,
    blocks: Params,
    h_BTD: jax.Array,
    position_BT: jax.Array,
    mask_BTS: jax.Array,
    keep: bool = False,
) -> tuple[jax.Array, Any]:
    """Runs stacked blocks over whole sequences; with `keep`, also returns keys and values as [L, B, S, G, K] each."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return attention(q, k, v, mask_BTS), (k, v) if keep else None

    def body(h: jax.Array, block: Params) -> tuple[jax.Array, Any]:
        return Block(arch).apply({"params": block}, h, position_BT, attend)  # pyright: ignore[reportReturnType]

    return jax.lax.scan(body, h_BTD, blocks)


def embed(arch: Architecture, table: Params, token_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Token embeddings, plus learned positions where the family has them. [B, T, D]."""
    h_BTD = table["tokens"][token_BT]
    if arch.positions == "learned":
        h_BTD = h_BTD + table["positions"][position_BT + arch.position_offset]
    return h_BTD


def trunk(arch: Architecture, frozen: Frozen, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The frozen part, run once for all roles: [B, T, D], or [B, T, 0] where nothing is frozen."""
    if not frozen.embed:
        return jnp.zeros((*token_BT.shape, 0), jnp.float32)
    position_BT = positions(mask_BT)
    h_BTD = embed(arch, frozen.embed, token_BT, position_BT)
    return run_blocks(arch, frozen.blocks, h_BTD, position_BT, causal(mask_BT))[0]


def run_top(arch: Architecture, top: Top, token_BT: jax.Array, hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The trained part on the trunk's output: the final normalised hidden states [B, T, D]."""
    position_BT = positions(mask_BT)
    h_BTD = embed(arch, top.embed, token_BT, position_BT) if top.embed else hidden_BTD
    h_BTD = run_blocks(arch, top.blocks, h_BTD, position_BT, causal(mask_BT))[0]
    return final_norm(arch, top, h_BTD)


def final_norm(arch: Architecture, top: Top, h_BTD: jax.Array) -> jax.Array:
    """The norm before the output head."""
    return Norm(arch).apply({"params": top.final_norm}, h_BTD)  # pyright: ignore[reportReturnType]


def logits(arch: Architecture, frozen: Frozen, top: Top, final_BTD: jax.Array) -> jax.Array:
    """Next-token logits [B, T, V] in f32, from final hidden states."""
    holder = frozen if (frozen.embed or frozen.lm_head) else top
    table_VD = holder.embed["tokens"] if arch.tied else holder.lm_head["kernel"]
    return jnp.einsum("...d,vd->...v", final_BTD, table_VD, preferred_element_type=jnp.float32)


def init(arch: Architecture, key: jax.Array) -> Params:
    """Fresh f32 parameters: {"embed", "blocks", "final_norm", "lm_head"}, every leaf of "blocks" [L, ...].

    Attention starts near the identity, as in Trockman & Kolter 2023 ("Mimetic initialization"): queries meet the keys
    of like tokens and values pass through, without which a small model does not learn to copy in hundreds of steps.
    """
    key_embed, key_position, key_blocks, key_head = jax.random.split(key, 4)
    h_BTD = jnp.zeros((1, 1, arch.width), jnp.float32)
    position_BT = jnp.zeros((1, 1), jnp.int32)
    mask_BTS = jnp.ones((1, 1, 1), jnp.bool_)

    def one(key: jax.Array) -> Params:
        attend: Attend = lambda q, k, v: (attention(q, k, v, mask_BTS), None)  # noqa: E731
        return _near_identity(dict(Block(arch).init(key, h_BTD, position_BT, attend)["params"]))

    scale = arch.width**-0.5
    table = {"tokens": scale * jax.random.normal(key_embed, (arch.vocab_size, arch.width), jnp.float32)}
    if arch.positions == "learned":
        rows = arch.max_positions + arch.position_offset
        table["positions"] = 0.02 * jax.random.normal(key_position, (rows, arch.width), jnp.float32)
    head = {} if arch.tied else {"kernel": scale * jax.random.normal(key_head, table["tokens"].shape, jnp.float32)}
    return {
        "embed": table,
        "blocks": jax.vmap(one)(jax.random.split(key_blocks, arch.layers)),
        "final_norm": Norm(arch).init(key_embed, h_BTD)["params"],
        "lm_head": head,
    }


def _near_identity(block: Params) -> Params:
    q_DHK, v_DGK = block["q"]["kernel"], block["v"]["kernel"]
    D, H, K = q_DHK.shape
    G = v_DGK.shape[1]
    eye_DHK = jnp.eye(D, H * K, dtype=jnp.float32).reshape(D, H, K)
    q = block["q"] | {"kernel": q_DHK * 0.5 + eye_DHK}
    k = block["k"] | {"kernel": block["k"]["kernel"] * 0.5 + eye_DHK[:, :: H // G]}
    v = block["v"] | {"kernel": v_DGK * 0.5 + 0.5 * eye_DHK[:, :: H // G]}
    o = block["o"] | {"kernel": block["o"]["kernel"] * 0.5 + 0.5 * eye_DHK.transpose(1, 2, 0)}
    return block | {"q": q, "k": k, "v": v, "o": o}
