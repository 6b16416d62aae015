"""The least arithmetic of a step, beside which `roofline.flops` of its program stands.

In floating-point operations of matrix products, an addition and a multiplication each: all else is a few per cent. The
least counts tokens of texts and pairs without padding, prompts of samples and rollouts with it, keys and queries that
causal attention needs, and no gradient of what is frozen. In PPO, whatever the sampler has computed of the trunk is not
computed again.
"""

from __future__ import annotations

from jaxrlhf import model
from jaxrlhf.bench.work import Work


def least(work: Work, arch: model.Architecture) -> int:
    """Of one step of `work`."""
    e = work.experiment
    k = int(e.model.freeze_layers * arch.layers)
    P, R = e.model.prompt_length, e.model.response_length
    if work.step == "sample":
        return _sampled(arch, e.sampling.batch_size, e.sampling.samples_per_prompt, P, R)
    if work.step == "sft":
        whole, heads = e.sft.prompt_weight > 0, 2 if e.model.freeze_layers else 3
        # Tokens of each text, and those whose states are asked for.
        texts = [(p + q, p + q - 1 if whole else q) for p, q, _ in work.lengths(e.sft.batch_size)]
        return sum(k * _block(arch, 1, n) + _trained(arch, k, 1, n, m) + heads * _head(arch, m) for n, m in texts)
    if work.step == "reward":
        return sum(_pair(arch, k, *lengths) for lengths in work.lengths(e.reward.batch_size))
    B, T = e.ppo.batch_size, P + R
    top = _blocks(arch, arch.layers - k, B, T, R)
    # The trunk once more for the last token alone, which the sampler need not feed back.
    scored = k * _block(arch, B, 1, keys=T) + 2 * (top + _head(arch, B * R)) + _blocks(arch, arch.layers - k, B, T, 1)
    learnt = e.ppo.epochs * (_trained(arch, k, B, T, R) + (2 if k else 3) * _head(arch, B * R))
    return _sampled(arch, B, 1, P, R) + scored + learnt


def _sampled(arch: model.Architecture, B: int, N: int, P: int, R: int) -> int:
    """Prompts once, and each token but the last fed back once."""
    fed = sum(arch.layers * _block(arch, B * N, 1, keys=P + i + 1) for i in range(R - 1))
    return _blocks(arch, arch.layers, B, P, 1) + fed + _head(arch, B + B * N * (R - 1))


def _blocks(arch: model.Architecture, layers: int, B: int, T: int, wanted: int) -> int:
    """Forward, where only the last `wanted` positions' final states are asked for."""
    return (layers - 1) * _block(arch, B, T) + _block(arch, B, T, wanted) if layers else 0


def _trained(arch: model.Architecture, k: int, B: int, T: int, wanted: int) -> int:
    """Forward and backward of the blocks above `k`; the lowest has no gradient to hand down, but to embeddings."""
    all_three = 3 * _blocks(arch, arch.layers - k, B, T, wanted)
    return all_three - _unasked(arch, k, B * T)


def _pair(arch: model.Architecture, k: int, p: int, q: int, r: int) -> int:
    """A prompt once, both responses after it, and the states at their ends."""
    T, seen = p + q + r, sum(range(p + q + r + 1)) - q * r
    trained = (arch.layers - k - 1) * _block(arch, 1, T, keys=seen) + _block(arch, 1, T, 2, keys=2 * p + q + r)
    return k * _block(arch, 1, T, keys=seen) + 3 * trained - _unasked(arch, k, T)


def _unasked(arch: model.Architecture, k: int, tokens: int) -> int:
    """The gradient with respect to the states that keys, queries and values of the lowest trained block are made of."""
    return 2 * tokens * arch.width * arch.head_width * (arch.heads + 2 * arch.kv_heads) if k else 0


def _block(arch: model.Architecture, B: int, T: int, queries: int = 0, keys: int = 0) -> int:
    """Of B rows' T tokens, the last `queries` of which (0 = all) are asked for.

    All queries of a row together see `keys`, or each those before it.
    """
    Q = queries or T
    D, inner, outer = arch.width, arch.heads * arch.head_width, arch.kv_heads * arch.head_width
    pairs = keys or sum(range(T - Q + 1, T + 1))
    each = 2 * D * inner + (3 if arch.gated else 2) * D * arch.ff_width
    return 2 * B * (Q * each + T * 2 * D * outer + 2 * pairs * inner)


def _head(arch: model.Architecture, tokens: int) -> int:
    return 2 * tokens * arch.vocab_size * arch.token_width
