"""One decoder-only transformer: a family (LLaMA, OPT, Gemma 2) is a row of options, not a class.

Axis letters, here and everywhere: B batch, P prompt, R response, T sequence (queries), S keys, D model width,
F feed-forward width, H heads, G key/value heads, K head width, V vocabulary, L layers, N samples a prompt.

Parameters are plain dicts, the blocks stacked on a leading layer axis and run by `lax.scan`. Flax Linen names and
initialises one block's parameters and is used nowhere else. Keys and values go in and out explicitly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxrlhf import attention, products
from jaxrlhf.architecture import FAMILIES as FAMILIES
from jaxrlhf.architecture import Architecture
from jaxrlhf.types import Frozen, Params, Top

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
Pick = Callable[[jax.Array], jax.Array]  # of [B, T, ...], the positions [B, Q, ...] that are asked for
Tree = TypeVar("Tree")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


# What a block's forward pass keeps for its gradients; the rest is computed again.
REMAT: dict[str, Callable[..., Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(attention.KEPT)
    ),
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Norm(nn.Module):
    """Root-mean-square or layer normalisation over the last axis, in f32."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        plus_one = self.arch.norm == "rms_plus_one"
        start = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = self.param("scale", start, (width,), jnp.float32) + (1.0 if plus_one else 0.0)
        x32 = x.astype(jnp.float32)
        if self.arch.norm == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.arch.norm_eps) * scale
        if self.arch.norm == "layer":
            x32 = x32 + self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        return x32.astype(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward. `attend(q, k, v)` decides what is attended to, and owns the cache.

    With `pick`, keys and values are those of all positions, and the rest is done for the picked ones alone.
    """

    arch: Architecture

    @nn.compact
    def __call__(
        self, h_BTD: jax.Array, position_BT: jax.Array, attend: Attend, pick: Pick = lambda x: x
    ) -> tuple[jax.Array, Any]:
        a = self.arch
        attn_norm, mlp_norm = Norm(a, name="attn_norm"), Norm(a, name="mlp_norm")
        x_BTD = h_BTD if a.norm_place == "post" else attn_norm(h_BTD)
        attn_BTD, kept = _attention(a, x_BTD, position_BT, attend, pick)
        h_BTD = pick(h_BTD)
        if a.norm_place == "both":
            attn_BTD = Norm(a, name="attn_post_norm")(attn_BTD)
        if a.parallel:
            return h_BTD + attn_BTD + _feed_forward(a, mlp_norm(h_BTD)), kept
        h_BTD = h_BTD + attn_BTD
        if a.norm_place == "post":
            h_BTD = attn_norm(h_BTD)
            return mlp_norm(h_BTD + _feed_forward(a, h_BTD)), kept
        mlp_BTD = _feed_forward(a, mlp_norm(h_BTD))
        return h_BTD + (Norm(a, name="mlp_post_norm")(mlp_BTD) if a.norm_place == "both" else mlp_BTD), kept


def _attention(
    a: Architecture, x_BTD: jax.Array, position_BT: jax.Array, attend: Attend, pick: Pick
) -> tuple[jax.Array, Any]:
    dense = partial(nn.DenseGeneral, dot_general=products.dot_general)
    q_BTHK = dense((a.heads, a.head_width), use_bias=a.qkv_bias, name="q")(pick(x_BTD))
    k_BTGK = dense((a.kv_heads, a.head_width), use_bias=a.qkv_bias, name="k")(x_BTD)
    v_BTGK = dense((a.kv_heads, a.head_width), use_bias=a.qkv_bias, name="v")(x_BTD)
    if a.qk_norm:
        q_BTHK, k_BTGK = Norm(a, name="q_norm")(q_BTHK), Norm(a, name="k_norm")(k_BTGK)
    if a.positions == "rope":
        frequency_K = frequencies(a)
        q_BTHK, k_BTGK = rotate(q_BTHK, pick(position_BT), frequency_K), rotate(k_BTGK, position_BT, frequency_K)
    out_BTHK, kept = attend(q_BTHK, k_BTGK, v_BTGK)
    return dense(a.width, axis=(-2, -1), use_bias=a.o_bias, name="o")(out_BTHK), kept


def _feed_forward(a: Architecture, x_BTD: jax.Array) -> jax.Array:
    act = ACTIVATIONS[a.activation]
    dense = partial(nn.Dense, use_bias=a.mlp_bias, dot_general=products.dot_general)
    up_BTF = dense(a.ff_width, name="up")(x_BTD)
    hidden_BTF = act(dense(a.ff_width, name="gate")(x_BTD)) * up_BTF if a.gated else act(up_BTF)
    return dense(a.width, name="down")(hidden_BTF)


def frequencies(arch: Architecture) -> jax.Array:
    """Radians a position of each rotated pair; f32 [K/2], less where only a share of the width is rotated.

    Linear scaling divides them all by its factor. LLaMA 3's (Dubey et al. 2024) divides those of waves longer than the
    original context / low, keeps those of waves shorter than context / high, and goes from one to the other between.
    """
    half = int(arch.head_width * arch.rope_share) // 2
    frequency_K = arch.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not arch.rope_scaling:
        return frequency_K
    factor, *bands = arch.rope_scaling
    if not bands:
        return frequency_K / factor
    low, high, context = bands
    kept_K = jnp.clip((context * frequency_K / (2 * jnp.pi) - low) / (high - low), 0.0, 1.0)
    return (1 - kept_K) * frequency_K / factor + kept_K * frequency_K


def rotate(x_BTHK: jax.Array, position_BT: jax.Array, frequency_K: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves paired as LLaMA's checkpoints have them.

    The first 2 x len(frequency_K) of the width are rotated, the rest passes.
    """
    half = len(frequency_K)
    angle_BT1K = position_BT[..., None, None].astype(jnp.float32) * frequency_K
    cos, sin = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
    low, high = x_BTHK[..., :half].astype(jnp.float32), x_BTHK[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).astype(x_BTHK.dtype)
    return jnp.concatenate([turned, x_BTHK[..., 2 * half :]], -1) if 2 * half < x_BTHK.shape[-1] else turned


def positions(mask_BT: jax.Array) -> jax.Array:
    """How many tokens of its text come before each token, so that padding changes nothing; int32 [B, T], 0 on it."""
    return jnp.where(mask_BT > 0, causal(mask_BT).sum(-1, dtype=jnp.int32) - 1, 0)


def causal(mask_BT: jax.Array) -> jax.Array:
    """Which keys each query sees: those of its own text, not later than itself. bool [B, T, S].

    The mask is 0 on padding, and 1 on real tokens where a row is one text. Texts that are packed into one row have a
    whole number each. Continuations of a text have its number plus a fraction of their own, and see it, but not each
    other. Padding sees padding.
    """
    own_BTS = mask_BT[:, :, None] == mask_BT[:, None, :]
    begun_BTS = jnp.floor(mask_BT)[:, :, None] == mask_BT[:, None, :]
    T = mask_BT.shape[-1]
    return jnp.tril(jnp.ones((T, T), jnp.bool_)) & (own_BTS | begun_BTS)


def before(mask_BT: jax.Array) -> jax.Array:
    """Where the token stands that each token follows in its text, or -1: int32 [B, T]."""
    T = mask_BT.shape[-1]
    earlier_BTS = causal(mask_BT) & jnp.tril(jnp.ones((T, T), jnp.bool_), -1)
    return jnp.where(earlier_BTS, jnp.arange(T, dtype=jnp.int32), -1).max(-1)


def depth(blocks: Params) -> int:
    """How many blocks are stacked."""
    return jax.tree.leaves(blocks)[0].shape[0]


def run_blocks(
    arch: Architecture,
    blocks: Params,
    h_BTD: jax.Array,
    position_BT: jax.Array,
    mask_BTS: jax.Array,
    keep: bool = False,
    first: int = 0,
    pick: Pick | None = None,
) -> tuple[jax.Array, Any]:
    """Runs stacked blocks, the model's `first` and on, over whole sequences.

    With `keep`, also returns keys and values as [L, B, S, G, K] each. With `pick`, the states of the positions that it
    takes, for which alone the last block then runs.
    """
    distance_BTS = position_BT[:, :, None] - position_BT[:, None, :]
    # None where no layer has a window: the scan then has nothing but the blocks to carry.
    window_L = None
    if arch.windows:
        everything = jnp.iinfo(jnp.int32).max
        window_L = jnp.asarray([w or everything for w in arch.windows], jnp.int32)[first : first + depth(blocks)]

    def body(h: jax.Array, layer: tuple[Params, jax.Array | None], pick: Pick = lambda x: x) -> tuple[jax.Array, Any]:
        block, window, h = cast(arch, layer[0]), layer[1], by_rows(h)
        seen_BTS = pick(mask_BTS if window is None else mask_BTS & (distance_BTS < window))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return attention.attention(arch, q, k, v, seen_BTS), (k, v) if keep else None

        return Block(arch).apply({"params": block}, h, position_BT, attend, pick)  # pyright: ignore[reportReturnType]

    layers, last = (blocks, window_L), body if pick is None else partial(body, pick=pick)
    if arch.remat != "none":
        # In a scan, XLA cannot merge what is computed again with what was computed first.
        body = jax.checkpoint(body, policy=REMAT[arch.remat], prevent_cse=False)
        last = jax.checkpoint(last, policy=REMAT[arch.remat])
    if pick is None or not depth(blocks):
        h_BTD, kept = jax.lax.scan(body, h_BTD, layers)
        return by_rows(h_BTD if pick is None else pick(h_BTD)), kept
    h_BTD, kept = jax.lax.scan(body, h_BTD, jax.tree.map(lambda x: x[:-1], layers))
    h_BQD, own = last(h_BTD, jax.tree.map(lambda x: x[-1], layers))
    return by_rows(h_BQD), jax.tree.map(lambda below, x: jnp.concatenate([below, x[None]]), kept, own)


def by_rows(h_BTD: jax.Array) -> jax.Array:
    """Keeps activations divided by rows over the mesh in use, where there is one.

    Left to itself, GSPMD may gather the rows and divide the width instead, as parameters under fsdp are divided.
    """
    if jax.sharding.get_abstract_mesh().empty or h_BTD.shape[0] % ways():
        return h_BTD
    return jax.lax.with_sharding_constraint(h_BTD, P(("data", "fsdp")))


def ways() -> int:
    """Over how many devices the mesh in use divides rows; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def gathers() -> bool:
    """Whether the mesh in use divides parameters by fsdp, so that each use of them gathers them."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def cast(arch: Architecture, tree: Tree) -> Tree:
    """Parameters as matrix products take them: the f32 masters stay as they are, one layer is cast at a time."""
    return jax.tree.map(lambda x: x.astype(arch.dtype), tree)


def embed(arch: Architecture, table: Params, token_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Token embeddings, plus learned positions where the family has them. [B, T, D]."""
    h_BTD = cast(arch, table["tokens"][token_BT])
    if arch.embed_scaled:
        h_BTD = h_BTD * jnp.asarray(arch.width**0.5, h_BTD.dtype)
    if arch.embed_width:
        h_BTD = h_BTD @ cast(arch, table["project_in"])
    if arch.positions == "learned":
        h_BTD = h_BTD + cast(arch, table["positions"][position_BT + arch.position_offset])
    return h_BTD


def trunk(arch: Architecture, frozen: Frozen, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The frozen part, run once for all roles: [B, T, D], or [B, T, 0] where nothing is frozen."""
    if not frozen.embed:
        return jnp.zeros((*token_BT.shape, 0), arch.dtype)
    position_BT = positions(mask_BT)
    h_BTD = embed(arch, frozen.embed, token_BT, position_BT)
    return run_blocks(arch, frozen.blocks, h_BTD, position_BT, causal(mask_BT))[0]


def run_top(
    arch: Architecture,
    top: Top,
    token_BT: jax.Array,
    hidden_BTD: jax.Array,
    mask_BT: jax.Array,
    pick: Pick | None = None,
) -> jax.Array:
    """The trained part on the trunk's output: the final normalised hidden states [B, T, D], or the picked [B, Q, D]."""
    position_BT = positions(mask_BT)
    h_BTD = embed(arch, top.embed, token_BT, position_BT) if top.embed else hidden_BTD
    first = arch.layers - depth(top.blocks)
    h_BTD = run_blocks(arch, top.blocks, h_BTD, position_BT, causal(mask_BT), first=first, pick=pick)[0]
    return final_norm(arch, top, h_BTD)


def final_norm(arch: Architecture, top: Top, h_BTD: jax.Array) -> jax.Array:
    """The norm before the output head, where there is one."""
    if not arch.final_norm:
        return h_BTD
    return Norm(arch).apply({"params": top.final_norm}, h_BTD)  # pyright: ignore[reportReturnType]


def logits(arch: Architecture, frozen: Frozen, top: Top, final_BTD: jax.Array) -> jax.Array:
    """Next-token logits [B, T, V] in f32, from final hidden states."""
    holder = frozen if (frozen.embed or frozen.lm_head) else top
    table_VD = holder.embed["tokens"] if arch.tied else holder.lm_head["kernel"]
    if arch.embed_width:
        final_BTD = final_BTD @ cast(arch, holder.embed["project_out"])
    last = (((final_BTD.ndim - 1,), (1,)), ((), ()))
    logits_BTV = products.dot_general(final_BTD, cast(arch, table_VD), last, preferred_element_type=jnp.float32)
    return attention.softcap(logits_BTV, arch.final_softcap)


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
        attend: Attend = lambda q, k, v: (attention.attention(arch, q, k, v, mask_BTS), None)  # noqa: E731
        return _near_identity(dict(Block(arch).init(key, h_BTD, position_BT, attend)["params"]))

    scale = arch.width**-0.5
    table = {"tokens": scale * jax.random.normal(key_embed, (arch.vocab_size, arch.token_width), jnp.float32)}
    if arch.positions == "learned":
        rows = arch.max_positions + arch.position_offset
        table["positions"] = 0.02 * jax.random.normal(key_position, (rows, arch.width), jnp.float32)
    if arch.embed_width:
        project_DE = arch.width**-0.5 * jax.random.normal(key_position, (arch.width, arch.embed_width), jnp.float32)
        table |= {"project_in": project_DE.T, "project_out": project_DE}
    head = {} if arch.tied else {"kernel": scale * jax.random.normal(key_head, table["tokens"].shape, jnp.float32)}
    return {
        "embed": table,
        "blocks": jax.vmap(one)(jax.random.split(key_blocks, arch.layers)),
        "final_norm": Norm(arch).init(key_embed, h_BTD)["params"] if arch.final_norm else {},
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
