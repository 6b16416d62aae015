"""Sampling: one jitted function. Prompts are prefilled once, and their keys and values shared by their N samples.

Rows that have ended leave: once no prompt has more than half of its samples to go on with, the loop goes on with as
many rows. Each row is drawn with numbers of its own, whichever rows are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf import attention, model
from jaxrlhf.parts import in_parts
from jaxrlhf.types import Frozen, Sample, Top

PREFILL = 2048  # tokens of prompts at a time on a device, or one prompt
HALVINGS = 1  # of the rows, as each number of them is compiled
FEWEST = 16  # rows to go on with: fewer take hardly less time


@dataclass(frozen=True)
class Generation:
    """How tokens are drawn; static under `jit`."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    eos_id: int = 1
    pad_id: int = 0


class _Prompts(NamedTuple):
    """What is known of the prompts; `prefix` has keys and values [B, G, P, K] of each layer."""

    mask_BP: jax.Array
    position_BP: jax.Array
    prefix: list[tuple[jax.Array, jax.Array]]


class _Rows(NamedTuple):
    """Those that still go on, m of M = B * N; `cache` has keys and values [m, G, R, K] of each layer."""

    row_m: jax.Array  # which of the M
    length_m: jax.Array  # of its prompt
    token_m: jax.Array  # its latest
    going_m: jax.Array  # whether that is to be fed back
    cache: list[tuple[jax.Array, jax.Array]]
    drawn: Sample  # `hidden_BTD` is the trunk's output at the tokens drawn, where it is asked for


class _Decoding(NamedTuple):
    """The loop's carry."""

    step: jax.Array  # tokens fed back so far, and the place of the latest one drawn
    rows: _Rows
    key: jax.Array


def warp(logits_MV: jax.Array, gen: Generation) -> jax.Array:
    """Logits of the distribution sampled from: temperature, then top-k, then top-p. f32 [M, V].

    top-k keeps every token that ties with the k-th; top-p keeps the smallest set of most probable tokens whose mass
    reaches p (Holtzman et al. 2020), the most probable one always. At temperature 0, all mass is on the first argmax.
    """
    if gen.temperature == 0:
        greedy_MV = jax.nn.one_hot(logits_MV.argmax(-1), logits_MV.shape[-1], dtype=jnp.bool_)
        return jnp.where(greedy_MV, 0.0, attention.MASKED)
    logits_MV = logits_MV.astype(jnp.float32) / gen.temperature
    if 0 < gen.top_k < logits_MV.shape[-1]:
        kth_M1 = jax.lax.top_k(logits_MV, gen.top_k)[0][:, -1:]
        logits_MV = jnp.where(logits_MV >= kth_M1, logits_MV, attention.MASKED)
    if gen.top_p < 1:
        sorted_MV = -jnp.sort(-logits_MV, axis=-1)
        probability_MV = jax.nn.softmax(sorted_MV, axis=-1)
        mass_before_MV = jnp.cumsum(probability_MV, axis=-1) - probability_MV
        kept_MV = mass_before_MV < gen.top_p
        least_M1 = jnp.min(jnp.where(kept_MV, sorted_MV, jnp.inf), axis=-1, keepdims=True)
        logits_MV = jnp.where(logits_MV >= least_M1, logits_MV, attention.MASKED)
    return logits_MV


def draw(logits_MV: jax.Array, uniform_M2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token of each row by the softmax of its logits, int32 [M], and its log-probability, f32 [M].

    By inversion: one uniform number in [0, 1) finds a block of about sqrt(V) tokens, one the token in it. Noise for
    each word (Gumbel-max) would take CPUs longer than the model where the vocabulary is large.
    """
    M, V = logits_MV.shape
    # No block lies on two devices where the vocabulary is divided over 2, 4 or 8; the same draws on every mesh.
    shards = math.gcd(V, 8)
    own = V // shards
    size = math.isqrt(own - 1) + 1
    blocks = -(-own // size)
    top_M1 = logits_MV.max(-1, keepdims=True)
    mass_MSV = jnp.exp(logits_MV - top_M1).reshape(M, shards, own)
    mass_MSV = jnp.pad(mass_MSV, ((0, 0), (0, 0), (0, blocks * size - own)))
    block_M, total_M = _invert(mass_MSV.reshape(M, shards * blocks, size).sum(-1), uniform_M2[:, 0])
    first_M, within_X = block_M // blocks * own, jnp.arange(size)
    place_MX = (block_M % blocks * size)[:, None] + within_X
    logits_MX = jnp.take_along_axis(logits_MV, first_M[:, None] + jnp.minimum(place_MX, own - 1), -1)
    chosen_M, _ = _invert(jnp.where(place_MX < own, jnp.exp(logits_MX - top_M1), 0.0), uniform_M2[:, 1])
    place_M1, logit_M1 = (jnp.take_along_axis(x, chosen_M[:, None], -1) for x in (place_MX, logits_MX))
    return first_M + place_M1[:, 0], (logit_M1 - top_M1)[:, 0] - jnp.log(total_M)


def _invert(mass_MX: jax.Array, uniform_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index with mass by which more than a share `uniform_M` of all is reached, and all mass; two [M]."""
    # Summed up in a tree, which need not rise from each index to the next.
    reached_MX = jnp.where(mass_MX > 0, jnp.cumsum(mass_MX, -1), 0.0)
    total_M = reached_MX.max(-1)
    return jnp.argmax(reached_MX > (uniform_M * total_M)[:, None], -1).astype(jnp.int32), total_M


@partial(jax.jit, static_argnames=("arch", "gen", "samples", "keep_trunk"))
def sample(
    arch: model.Architecture,
    gen: Generation,
    frozen: Frozen,
    top: Top,
    prompt_BP: jax.Array,
    mask_BP: jax.Array,
    key: jax.Array,
    samples: int = 1,
    keep_trunk: bool = False,
) -> Sample:
    """Draws `samples` responses to each left-padded prompt; rows are prompt-major, [B * N, R].

    Stops as soon as every row has ended. `logp` is under the distribution that was sampled from; the end-of-text token
    counts as part of the response. With `keep_trunk`, the trunk's output at prompts and responses comes along, where
    there is a trunk, so that nobody who shares it has to run it again.
    """
    B, M, R = len(prompt_BP), len(prompt_BP) * samples, gen.max_tokens
    final_B1D, hidden_BPD, prefix = _prefill(arch, frozen, top, prompt_BP, mask_BP)
    prompts = _Prompts(mask_BP, model.positions(mask_BP), prefix)
    parts = (frozen.blocks, top.blocks)
    layers = [
        model.cast(arch, jax.tree.map(lambda x, i=i: x[i], part)) for part in parts for i in range(model.depth(part))
    ]
    empty = jnp.zeros((M, arch.kv_heads, R, arch.head_width), prefix[0][0].dtype)
    kept = keep_trunk and bool(frozen.embed)
    drawn = Sample(
        tokens_BR=jnp.full((M, R), gen.pad_id, jnp.int32),
        mask_BR=jnp.zeros((M, R), jnp.float32),
        logp_BR=jnp.zeros((M, R), jnp.float32),
        finished_B=jnp.zeros((M,), jnp.bool_),
        hidden_BTD=model.by_rows(jnp.zeros((M, R, arch.width), hidden_BPD.dtype)) if kept else None,
    )
    rows = _Rows(
        row_m=jnp.arange(M),
        length_m=jnp.repeat(mask_BP.sum(-1).astype(jnp.int32), samples),
        token_m=jnp.full((M,), gen.pad_id, jnp.int32),
        going_m=jnp.ones((M,), jnp.bool_),
        cache=[(empty, empty) for _ in layers],
        drawn=drawn,
    )
    logits_MV = jnp.repeat(model.logits(arch, frozen, top, final_B1D)[:, 0], samples, axis=0)
    s = _draw(gen, _Decoding(jnp.int32(0), rows, key), logits_MV, M)
    # The last token too is fed back only for the trunk's output at it.
    steps = R if kept else R - 1
    sizes = _sizes(B, samples)
    for size, smaller in pairwise([*sizes, 0]):

        def goes_on(s: _Decoding, size: int = size, smaller: int = smaller) -> jax.Array:
            return (s.step < steps) & (s.rows.going_m.reshape(B, size).sum(1) > smaller).any()

        def body(s: _Decoding) -> _Decoding:
            return _draw(gen, *_advance(arch, frozen, top, layers, prompts, s), M)

        s = jax.lax.while_loop(goes_on, body, s)
        drawn = s.rows.drawn if size == sizes[0] else _put(drawn, s.rows, B)
        if smaller:
            s = s._replace(rows=_fewer(s.rows, B, smaller))
    if drawn.hidden_BTD is None:
        return drawn
    hidden_MTD = jnp.concatenate([jnp.repeat(hidden_BPD, samples, 0), drawn.hidden_BTD], 1)
    return drawn.replace(hidden_BTD=hidden_MTD)  # pyright: ignore[reportAttributeAccessIssue]


def _put(drawn: Sample, rows: _Rows, B: int) -> Sample:
    """All rows' results, with what is new of those that still go on."""

    def put(x_M: jax.Array, x_m: jax.Array) -> jax.Array:
        x_BN, x_Bn = (x.reshape(B, -1, *x.shape[1:]) for x in (x_M, x_m))
        place_Bn = rows.row_m.reshape(B, -1) % x_BN.shape[1]
        return jax.vmap(lambda whole, place, some: whole.at[place].set(some))(x_BN, place_Bn, x_Bn).reshape(x_M.shape)

    return jax.tree.map(put, drawn, rows.drawn)


def _sizes(B: int, samples: int) -> list[int]:
    """Samples of a prompt that go on, from all of them down. Where there is one, its keys would be moved with it."""
    sizes = [samples]
    while len(sizes) <= HALVINGS and B * (half := -(-sizes[-1] // 2)) >= FEWEST and half < sizes[-1]:
        sizes.append(half)
    return sizes


def _fewer(rows: _Rows, B: int, size: int) -> _Rows:
    """Of each prompt's rows those that go on, and as many others as make `size`: none changes devices."""
    order_Bn = jnp.argsort(~rows.going_m.reshape(B, -1), axis=1, stable=True)[:, :size]

    def taken(x: jax.Array) -> jax.Array:
        some = jax.vmap(lambda x, order_n: x[order_n])(x.reshape(B, -1, *x.shape[1:]), order_Bn)
        return some.reshape(B * size, *x.shape[1:])

    return jax.tree.map(taken, rows)


def _prefill(arch, frozen, top, prompt_BP, mask_BP) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Final state at the last token [B, 1, D], the trunk's output, and each layer's keys and values [B, G, P, K]."""
    # The stacked layers' keys and values of all prompts, and a copy of each layer's, would be held at once.
    B, P = prompt_BP.shape
    most, rows = B * P // (PREFILL * model.ways()), B // model.ways()
    parts = next((n for n in range(min(most, rows), 1, -1) if rows % n == 0), 1)
    return in_parts(partial(_prefill_some, arch, frozen, top), (prompt_BP, mask_BP), parts)


def _prefill_some(arch, frozen, top, rows):
    prompt_BP, mask_BP = rows
    position_BP = model.positions(mask_BP)
    run = partial(model.run_blocks, arch, position_BT=position_BP, mask_BTS=model.causal(mask_BP), keep=True)
    hidden_BPD = model.embed(arch, frozen.embed or top.embed, prompt_BP, position_BP)
    hidden_BPD, lower = run(frozen.blocks, hidden_BPD)
    h_B1D, upper = run(top.blocks, hidden_BPD, first=model.depth(frozen.blocks), pick=lambda x: x[:, -1:])
    prefix = [
        (k_LBPGK[i].swapaxes(1, 2), v_LBPGK[i].swapaxes(1, 2))
        for k_LBPGK, v_LBPGK in (lower, upper)
        for i in range(len(k_LBPGK))
    ]
    return model.final_norm(arch, top, h_B1D), hidden_BPD, prefix


def _draw(gen: Generation, s: _Decoding, logits_mV: jax.Array, M: int) -> _Decoding:
    """Draws the token at `step` of every row that has not ended, where there may be one."""
    rows, drawn = s.rows, s.rows.drawn
    # Numbers for all M rows, so that each has its own whichever are left.
    uniform_M2 = jax.random.uniform(jax.random.fold_in(s.key, s.step), (M, 2))
    drawn_m, logp_m = draw(warp(logits_mV, gen), uniform_M2[rows.row_m])
    alive_m = ~drawn.finished_B & (s.step < gen.max_tokens)
    token_m = jnp.where(alive_m, drawn_m, gen.pad_id)
    put = lambda x_mR, x_m: x_mR.at[:, s.step].set(x_m, mode="drop")  # noqa: E731
    drawn = drawn.replace(  # pyright: ignore[reportAttributeAccessIssue]
        tokens_BR=put(drawn.tokens_BR, token_m),
        mask_BR=put(drawn.mask_BR, alive_m.astype(jnp.float32)),
        logp_BR=put(drawn.logp_BR, jnp.where(alive_m, logp_m, 0.0)),
        finished_B=drawn.finished_B | (alive_m & (drawn_m == gen.eos_id)),
    )
    # An end-of-text token is fed back only for the trunk's output at it.
    going_m = alive_m if drawn.hidden_BTD is not None else alive_m & ~drawn.finished_B
    return s._replace(rows=rows._replace(token_m=token_m, going_m=going_m, drawn=drawn))


def _advance(arch, frozen, top, layers, prompts: _Prompts, s: _Decoding) -> tuple[_Decoding, jax.Array]:
    """Feeds the latest tokens through all layers, which attend to the shared prefix and to each row's own suffix.

    Returns logits [m, V] for the next ones.
    """
    rows, drawn = s.rows, s.rows.drawn
    position_M1 = (rows.length_m + s.step)[:, None]
    h, cache = [model.embed(arch, frozen.embed or top.embed, rows.token_m[:, None], position_M1)], []
    windows = arch.windows or (0,) * arch.layers
    for block, shared, own, window in zip(layers, prompts.prefix, rows.cache, windows, strict=True):
        attend = partial(_attend, arch, window, prompts, shared, own, s.step)
        h_M1D, kept = model.Block(arch).apply({"params": block}, h[-1], position_M1, attend)
        h, cache = [*h, h_M1D], [*cache, kept]
    if drawn.hidden_BTD is not None:
        hidden_MRD = drawn.hidden_BTD.at[:, s.step].set(h[model.depth(frozen.blocks)][:, 0])
        drawn = drawn.replace(hidden_BTD=hidden_MRD)  # pyright: ignore[reportAttributeAccessIssue]
    logits_mV = model.logits(arch, frozen, top, model.final_norm(arch, top, h[-1]))[:, 0]
    return s._replace(step=s.step + 1, rows=rows._replace(cache=cache, drawn=drawn)), logits_mV


def _attend(arch, window, prompts, shared, own, step, q_M1HK, k_M1GK, v_M1GK):
    """One query a row over prefix keys [B, G, P, K] (never repeated N times) and suffix keys [M, G, R, K]."""
    M, _, H, K = q_M1HK.shape
    (B, G, P, _), R = shared[0].shape, own[0].shape[2]
    N, Q = M // B, H // G
    mask_BP, position_BP, _ = prompts
    seen_BP, seen_R = mask_BP > 0, jnp.arange(R) <= step
    if window:
        own_B1 = mask_BP.sum(-1, keepdims=True).astype(jnp.int32) + step
        seen_BP &= own_B1 - position_BP < window
        seen_R &= step - jnp.arange(R) < window
    k_MGRK = jax.lax.dynamic_update_slice_in_dim(own[0], k_M1GK.swapaxes(1, 2), step, axis=2)
    v_MGRK = jax.lax.dynamic_update_slice_in_dim(own[1], v_M1GK.swapaxes(1, 2), step, axis=2)
    q_BGXK = q_M1HK.reshape(B, N, G, Q, K).swapaxes(1, 2).reshape(B, G, N * Q, K)
    prefix_BGXP = jnp.einsum("bgxk,bgpk->bgxp", q_BGXK, shared[0], preferred_element_type=jnp.float32)
    prefix_BGXP = jnp.where(seen_BP[:, None, None], attention.scaled(arch, prefix_BGXP), attention.MASKED)
    prefix_MGQP = prefix_BGXP.reshape(B, G, N, Q, P).swapaxes(1, 2).reshape(M, G, Q, P)
    suffix_MGQR = jnp.einsum("mgqk,mgrk->mgqr", q_M1HK.reshape(M, G, Q, K), k_MGRK, preferred_element_type=jnp.float32)
    suffix_MGQR = jnp.where(seen_R, attention.scaled(arch, suffix_MGQR), attention.MASKED)
    weight = jax.nn.softmax(jnp.concatenate([prefix_MGQP, suffix_MGQR], -1), axis=-1).astype(v_MGRK.dtype)
    weight_BGXP = weight[..., :P].reshape(B, N, G, Q, P).swapaxes(1, 2).reshape(B, G, N * Q, P)
    out_BGXK = jnp.einsum("bgxp,bgpk->bgxk", weight_BGXP, shared[1])
    out_MGQK = out_BGXK.reshape(B, G, N, Q, K).swapaxes(1, 2).reshape(M, G, Q, K)
    out_MGQK = out_MGQK + jnp.einsum("mgqr,mgrk->mgqk", weight[..., P:], v_MGRK)
    return out_MGQK.reshape(M, 1, H, K), (k_MGRK, v_MGRK)
