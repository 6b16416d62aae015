"""Sampling: one jitted function. Prompts are prefilled once, and their keys and values shared by their N samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf import attention, model
from jaxrlhf.types import Frozen, Sample, Top


@dataclass(frozen=True)
class Generation:
    """How tokens are drawn; static under `jit`."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    eos_id: int = 1
    pad_id: int = 0


class _Decoding(NamedTuple):
    """The loop's carry. M = B * N rows; `cache` has keys and values [M, G, R, K] of each layer."""

    step: jax.Array
    token_M: jax.Array
    done_M: jax.Array
    tokens_MR: jax.Array
    mask_MR: jax.Array
    logp_MR: jax.Array
    logits_MV: jax.Array
    cache: list[tuple[jax.Array, jax.Array]]
    key: jax.Array


def warp(logits_MV: jax.Array, gen: Generation) -> jax.Array:
    """Log-probabilities of the distribution sampled from: temperature, then top-k, then top-p. f32 [M, V].

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
    return jax.nn.log_softmax(logits_MV, axis=-1)


@partial(jax.jit, static_argnames=("arch", "gen", "samples"))
def sample(
    arch: model.Architecture,
    gen: Generation,
    frozen: Frozen,
    top: Top,
    prompt_BP: jax.Array,
    mask_BP: jax.Array,
    key: jax.Array,
    samples: int = 1,
) -> Sample:
    """Draws `samples` responses to each left-padded prompt; rows are prompt-major, [B * N, R].

    Stops as soon as every row has ended. `logp` is under the distribution that was sampled from; the end-of-text token
    counts as part of the response.
    """
    B, P = prompt_BP.shape
    M, R = B * samples, gen.max_tokens
    final_B1D, prefix = _prefill(arch, frozen, top, prompt_BP, mask_BP)
    logits_MV = jnp.repeat(model.logits(arch, frozen, top, final_B1D)[:, 0], samples, axis=0)
    parts = (frozen.blocks, top.blocks)
    layers = [
        model.cast(arch, jax.tree.map(lambda x, i=i: x[i], part)) for part in parts for i in range(model.depth(part))
    ]
    position_BP = model.positions(mask_BP)
    length_M = jnp.repeat(mask_BP.sum(-1).astype(jnp.int32), samples)
    empty = jnp.zeros((M, arch.kv_heads, R, arch.head_width), prefix[0][0].dtype)
    state = _Decoding(
        step=jnp.int32(0),
        token_M=jnp.full((M,), gen.pad_id, jnp.int32),
        done_M=jnp.zeros((M,), jnp.bool_),
        tokens_MR=jnp.full((M, R), gen.pad_id, jnp.int32),
        mask_MR=jnp.zeros((M, R), jnp.float32),
        logp_MR=jnp.zeros((M, R), jnp.float32),
        logits_MV=logits_MV,
        cache=[(empty, empty) for _ in layers],
        key=key,
    )

    def body(s: _Decoding) -> _Decoding:
        s = _draw(gen, s)
        h_M1D, cache = _advance(arch, frozen, top, layers, prefix, mask_BP, position_BP, length_M, s)
        return s._replace(logits_MV=model.logits(arch, frozen, top, h_M1D)[:, 0], cache=cache, step=s.step + 1)

    # The last token drawn is never fed back, so the loop stops one step short and draws it after.
    state = jax.lax.while_loop(lambda s: (s.step < R - 1) & ~s.done_M.all(), body, state)
    state = _draw(gen, state)
    return Sample(tokens_BR=state.tokens_MR, mask_BR=state.mask_MR, logp_BR=state.logp_MR, finished_B=state.done_M)


def _prefill(arch, frozen, top, prompt_BP, mask_BP) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """Final hidden state at the prompts' last token [B, 1, D], and each layer's keys and values [B, G, P, K]."""
    position_BP, mask_BPS = model.positions(mask_BP), model.causal(mask_BP)
    h_BPD = model.embed(arch, frozen.embed or top.embed, prompt_BP, position_BP)
    prefix = []
    for blocks, pick in ((frozen.blocks, None), (top.blocks, lambda x: x[:, -1:])):
        h_BPD, (k_LBPGK, v_LBPGK) = model.run_blocks(
            arch, blocks, h_BPD, position_BP, mask_BPS, keep=True, first=len(prefix), pick=pick
        )
        prefix += [(k_LBPGK[i].swapaxes(1, 2), v_LBPGK[i].swapaxes(1, 2)) for i in range(model.depth(blocks))]
    return model.final_norm(arch, top, h_BPD), prefix


def _draw(gen: Generation, s: _Decoding) -> _Decoding:
    """Draws the next token of every row that has not ended."""
    logp_MV = warp(s.logits_MV, gen)
    # jax.random.categorical, but for the barrier: fused into the argmax, the noise takes four times as long on CPUs.
    noise_MV = jax.lax.optimization_barrier(jax.random.gumbel(jax.random.fold_in(s.key, s.step), logp_MV.shape))
    drawn_M = jnp.argmax(noise_MV + logp_MV, axis=-1).astype(jnp.int32)
    token_M = jnp.where(s.done_M, gen.pad_id, drawn_M)
    alive_M = ~s.done_M
    logp_M = jnp.where(alive_M, jnp.take_along_axis(logp_MV, drawn_M[:, None], -1)[:, 0], 0.0)
    return s._replace(
        token_M=token_M,
        tokens_MR=s.tokens_MR.at[:, s.step].set(token_M),
        mask_MR=s.mask_MR.at[:, s.step].set(alive_M.astype(jnp.float32)),
        logp_MR=s.logp_MR.at[:, s.step].set(logp_M),
        done_M=s.done_M | (drawn_M == gen.eos_id),
    )


def _advance(arch, frozen, top, layers, prefix, mask_BP, position_BP, length_M, s: _Decoding):
    """Feeds the drawn tokens through all layers, which attend to the shared prefix and to each row's own suffix."""
    position_M1 = (length_M + s.step)[:, None]
    h_M1D = model.embed(arch, frozen.embed or top.embed, s.token_M[:, None], position_M1)
    cache = []
    windows = arch.windows or (0,) * arch.layers
    for block, shared, own, window in zip(layers, prefix, s.cache, windows, strict=True):
        attend = partial(
            _attend, arch, window, shared=shared, own=own, mask_BP=mask_BP, position_BP=position_BP, step=s.step
        )
        h_M1D, kept = model.Block(arch).apply({"params": block}, h_M1D, position_M1, attend)
        cache.append(kept)
    return model.final_norm(arch, top, h_M1D), cache


def _attend(arch, window, q_M1HK, k_M1GK, v_M1GK, *, shared, own, mask_BP, position_BP, step):
    """One query a row over prefix keys [B, G, P, K] (never repeated N times) and suffix keys [M, G, R, K]."""
    M, _, H, K = q_M1HK.shape
    (B, G, P, _), R = shared[0].shape, own[0].shape[2]
    N, Q = M // B, H // G
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
