"""How varied a set of texts is: EAD, distinct-n and n-gram cosine; and all text metrics of a policy's responses.

Per input, the set is the N responses to one prompt; across inputs, one response to each (Kirk et al. 2024, s. 5). Of
every metric, more is more varied. All of them move with length: `of_texts` measures texts cut to a common length too.

Axis letters: T texts, S sets, B prompts, N responses to a prompt, G blocks of prompts, M n-grams that a text has (each
text's own, without repeats), K n-grams that a set has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation import overlap
from jaxrlhf.evaluation.ngrams import ORDERS, Grams, OfSets, Pairs, count, cut, sizes, slots
from jaxrlhf.evaluation.statistics import narrowed, over_items

COSINE_ORDER = 3
EAD_VOCABULARY = 50_257  # GPT-2's, as in the released code; see `ead`


@dataclass(frozen=True)
class Varied:
    """Metrics of a policy's responses: [B] of each prompt's; and over one to each, with [B] values without a prompt."""

    per_input: dict[str, np.ndarray]
    across_input: dict[str, tuple[float, np.ndarray]]


class Across(NamedTuple):
    """A metric across inputs, averaged over responses; without each prompt; and its `pairs` as `narrowed` has them."""

    value: float
    without_B: np.ndarray
    pairs: float


def distinct(texts: Sequence[str], paper_compat: bool = False) -> float:
    """Distinct n-grams over all n-grams of the set, averaged over n = 1 to 5 (Li et al. 2016). In [0, 1].

    An n of which the set has no n-gram counts as 0, so very short texts score low whatever they say.
    """
    return _of_one_set("distinct", texts, paper_compat)


def ead(texts: Sequence[str], paper_compat: bool = False) -> float:
    """Expectation-adjusted distinct n-grams (Liu et al. 2022), averaged over n = 1 to 5.

    N / (V (1 - ((V - 1) / V)^C)) with N distinct of C n-grams and V = 50257: the distinct n-grams over the number that
    C draws from V equally likely ones would give; 0 where there is none. At least 0; as there are more n-grams than V
    for n > 1, it can exceed 1, and across inputs it grows with the length of the texts.
    """
    return _of_one_set("ead", texts, paper_compat)


def ngram_cosine(texts: Sequence[str], paper_compat: bool = False) -> float:
    """Mean over pairs of 1 - cosine of their 3-gram counts (Tevet & Berant 2021). In [0, 1]; 0 for one text.

    A text without 3-grams is like no other, as in the released code.
    """
    return _of_one_set("cosine", texts, paper_compat)


def per_input(orders: Sequence[Grams], prompts: int, samples: int) -> dict[str, np.ndarray]:
    """Each metric of each prompt's own responses: arrays [B]. `orders` counts the texts of [B][N] in a row."""
    return {name: m.of_set_S for name, m in _measure(orders, np.repeat(np.arange(prompts), samples)).items()}


def across_input(orders: Sequence[Grams], prompts: int, samples: int) -> dict[str, Across]:
    """Each metric over one response to each prompt, averaged over which response; also without each prompt.

    Set j holds response j of every prompt. `orders` as in `per_input`.
    """
    prompt_T = np.repeat(np.arange(prompts), samples)
    found = {}
    for name, m in _measure(orders, np.tile(np.arange(samples), prompts)).items():
        without_B = m.without_T.reshape(prompts, samples).mean(1)
        pairs = m.pairs.squared(prompt_T) / samples**2 if m.pairs else 0.0
        found[name] = Across(float(m.of_set_S.mean()), without_B, pairs)
    return found


def of_texts(texts_BN: Sequence[Sequence[str]], block_B: np.ndarray, paper_compat: bool, cut_words: int = 0) -> Varied:
    """Every metric of texts, in both scopes; of their first `cut_words` words unless that is 0.

    `block_B` names each prompt's block for the intervals of metrics that are too dear to compute without each prompt.
    """
    prompts, samples = len(texts_BN), len(texts_BN[0])
    if cut_words:
        texts_BN = [[cut(t, cut_words) for t in texts] for texts in texts_BN]
    orders = count([t for texts in texts_BN for t in texts], paper_compat)

    def compression(prompt: np.ndarray) -> list[float]:
        kept = [texts_BN[int(b)] for b in prompt]
        return [overlap.compression(texts) for texts in zip(*kept, strict=True)]

    across = {
        name: (m.value, narrowed(m.without_B, m.pairs)) for name, m in across_input(orders, prompts, samples).items()
    }
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter
        across["compression"] = by_blocks(block_B, compression, pool.map)
    if samples == 1:
        return Varied({}, across)
    own = per_input(orders, prompts, samples)
    return Varied(own | {"compression": np.array([overlap.compression(texts) for texts in texts_BN])}, across)


def by_blocks(
    block_B: np.ndarray, measure: Callable[[np.ndarray], Sequence[float]], over: Callable[..., Iterable[Any]] = map
) -> tuple[float, np.ndarray]:
    """A metric across inputs, averaged over responses, and [B] values for `jackknife`, from leaving out whole blocks.

    `measure` takes which prompts, and returns the metric over each one's j-th response, for every j; `over` is `map`
    or does as it does. Of outputs that repeat each other's words these intervals hold the truth 98 to 99 % of the time:
    they are too wide. Pairs of so few blocks know too little for `narrowed`: in the five ways tried it was 65 to 91 %.
    """
    everything = np.arange(len(block_B))
    blocks = block_B.max() + 1
    left = [everything[block_B != g] for g in range(blocks)] if blocks > 1 else []
    whole, *without = (float(np.mean(found)) for found in over(measure, [everything, *left]))
    return whole, over_items(np.array(without), block_B) if without else np.full(len(block_B), whole)


def _of_one_set(name: str, texts: Sequence[str], paper_compat: bool) -> float:
    return float(_measure(count(texts, paper_compat), np.zeros(len(texts), np.int64))[name].of_set_S[0])


def _measure(orders: Sequence[Grams], set_T: np.ndarray) -> dict[str, OfSets]:
    """Every metric of the sets that `set_T` names: text t is in set `set_T[t]`."""
    totals = [_totals(grams, set_T) for grams in orders]
    found = {}
    for name, expected in (("ead", _expected), ("distinct", lambda count: count)):
        whole_S, without_T, pairs = [], [], []
        for t in totals:
            per_S = 1 / np.maximum(expected(t.count_S), 1)
            whole_S.append(t.kinds_S * per_S)
            # Only n-grams that a text alone has go with it.
            left_T = t.count_S[set_T] - t.own_T
            without_T.append((t.kinds_S[set_T] - t.alone_T) / np.maximum(expected(left_T), 1))
            pairs.append(-per_S[set_T[t.one_P]] / len(orders))
        one_P, two_P = np.concatenate([t.one_P for t in totals]), np.concatenate([t.two_P for t in totals])
        shared = Pairs(one_P, two_P, np.concatenate(pairs))
        found[name] = OfSets(np.mean(whole_S, axis=0), np.mean(without_T, axis=0), shared)
    return found | {
        "cosine": _cosine(orders[ORDERS.index(COSINE_ORDER)], set_T),
        "self_bleu": overlap.self_bleu_of_sets(orders, set_T),
    }


@dataclass(frozen=True)
class _Totals:
    """Of one order: each set's n-grams and distinct ones, each text's n-grams and those that it alone has in its set.

    Each n-gram that two texts of a set alone have is a pair.
    """

    count_S: np.ndarray
    kinds_S: np.ndarray
    own_T: np.ndarray
    alone_T: np.ndarray
    one_P: np.ndarray
    two_P: np.ndarray


def _totals(grams: Grams, set_T: np.ndarray) -> _Totals:
    set_K, slot_M, holders_K = slots(grams, set_T)
    sets, texts = len(sizes(set_T)), len(set_T)
    held_M = holders_K[slot_M]
    two_M = np.flatnonzero(held_M == 2)
    pairs_P2 = grams.text_M[two_M[np.argsort(slot_M[two_M], kind="stable")]].reshape(-1, 2)
    return _Totals(
        count_S=np.bincount(set_T[grams.text_M], grams.count_M, sets),
        kinds_S=np.bincount(set_K, minlength=sets),
        own_T=np.bincount(grams.text_M, grams.count_M, texts),
        alone_T=np.bincount(grams.text_M, held_M == 1, texts),
        one_P=pairs_P2[:, 0],
        two_P=pairs_P2[:, 1],
    )


def _expected(count: np.ndarray) -> np.ndarray:
    """Distinct n-grams that so many draws from V equally likely ones would give."""
    v = float(EAD_VOCABULARY)
    return v * (1 - ((v - 1) / v) ** count)


def _cosine(grams: Grams, set_T: np.ndarray) -> OfSets:
    """With u_t a text's counts at length 1, all pairs' cosines in a set sum to (|sum u_t|^2 - sum |u_t|^2) / 2."""
    set_K, slot_M, _ = slots(grams, set_T)
    size_S, texts = sizes(set_T), len(set_T)
    norm_T = np.sqrt(np.bincount(grams.text_M, grams.count_M**2, texts))
    unit_M = grams.count_M / norm_T[grams.text_M]
    sum_K = np.bincount(slot_M, unit_M)
    with_others_T = np.bincount(grams.text_M, unit_M * (sum_K[slot_M] - unit_M), texts)
    total_S = np.bincount(set_T, with_others_T, len(size_S)) / 2
    whole_S = _one_minus_mean(total_S, size_S, 0.0)
    return OfSets(whole_S, _one_minus_mean(total_S[set_T] - with_others_T, size_S[set_T] - 1, whole_S[set_T]))


def _one_minus_mean(total: np.ndarray, size: np.ndarray, alone: float | np.ndarray) -> np.ndarray:
    """1 - mean over pairs, and `alone` where there is no pair."""
    pairs = size * (size - 1) / 2
    return np.where(pairs > 0, np.clip(1 - total / np.maximum(pairs, 1), 0.0, 1.0), alone)
