"""How varied a set of texts is: EAD, distinct-n and n-gram cosine.

Per input, the set is the N responses to one prompt; across inputs, one response to each (Kirk et al. 2024, s. 5).

Axis letters: T texts, S sets, B prompts, W words of all texts in a row, M n-grams that a text has (each text's own,
without repeats), K n-grams that a set has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

ORDERS = (1, 2, 3, 4, 5)
COSINE_ORDER = 3
EAD_VOCABULARY = 50_257  # GPT-2's, as in the released code; see `ead`

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Grams:
    """The n-grams of T texts, for one n."""

    text_M: np.ndarray  # whose
    gram_M: np.ndarray  # which, numbered over all texts
    count_M: np.ndarray  # how often


@dataclass(frozen=True)
class Measured:
    """A metric of every set, and of each text's set without that text."""

    of_set_S: np.ndarray
    without_T: np.ndarray


def words(text: str, paper_compat: bool = False) -> list[str]:
    """Words and punctuation marks of a text, as they are written: capitals tell words apart.

    With `paper_compat`, as the released code splits: full stops and newlines vanish without leaving a space, and what
    single spaces part is a word.
    """
    if paper_compat:
        return [w for w in text.replace(".", "").replace("\n", "").split(" ") if w]
    return _WORDS.findall(text)


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


def across_input(orders: Sequence[Grams], prompts: int, samples: int) -> dict[str, tuple[float, np.ndarray]]:
    """Each metric over one response to each prompt, averaged over which response; also without each prompt.

    Set j holds response j of every prompt. Returns (value, [B] values without one). `orders` as in `per_input`.
    """
    measured = _measure(orders, np.tile(np.arange(samples), prompts))
    return {
        name: (float(m.of_set_S.mean()), m.without_T.reshape(prompts, samples).mean(1)) for name, m in measured.items()
    }


def count(texts: Sequence[str], paper_compat: bool = False) -> list[Grams]:
    """The n-grams of each order, as numbers: Python's own tuples and counters would take ten times the memory."""
    index: dict[str, int] = {}
    split = [[index.setdefault(w, len(index)) for w in words(t, paper_compat)] for t in texts]
    word_W = np.fromiter(chain.from_iterable(split), np.int64)
    text_W = np.repeat(np.arange(len(texts)), [len(ws) for ws in split])
    bound = max(len(word_W), 1)  # above every number given to an n-gram
    gram_W, orders = word_W, []
    for n in ORDERS:
        if n > 1:  # the n-gram from a word on is the (n-1)-gram from there and one word more
            _, gram_W = np.unique(gram_W[:-1] * bound + word_W[n - 1 :], return_inverse=True)
        within_W = text_W[: len(gram_W)] == text_W[n - 1 :]
        pairs, count_M = np.unique((text_W[: len(gram_W)] * bound + gram_W)[within_W], return_counts=True)
        orders.append(Grams(pairs // bound, pairs % bound, count_M))
    return orders


def _of_one_set(name: str, texts: Sequence[str], paper_compat: bool) -> float:
    return float(_measure(count(texts, paper_compat), np.zeros(len(texts), np.int64))[name].of_set_S[0])


def _measure(orders: Sequence[Grams], set_T: np.ndarray) -> dict[str, Measured]:
    """Every metric of the sets that `set_T` names: text t is in set `set_T[t]`."""
    totals = [_totals(grams, set_T) for grams in orders]
    found = {}
    for name, f in (("ead", _ead), ("distinct", _distinct)):
        whole = np.mean([f(count_S, kinds_S) for count_S, kinds_S, _, _ in totals], axis=0)
        # Only n-grams that a text alone has go with it.
        without = [f(count_S[set_T] - own_T, kinds_S[set_T] - alone_T) for count_S, kinds_S, own_T, alone_T in totals]
        found[name] = Measured(whole, np.mean(without, axis=0))
    return found | {"cosine": _cosine(orders[ORDERS.index(COSINE_ORDER)], set_T)}


def _totals(grams: Grams, set_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """N-grams and distinct n-grams of each set, n-grams of each text, and those that no other text of its set has."""
    set_K, slot_M, holders_K = _slots(grams, set_T)
    sets, texts = len(_sizes(set_T)), len(set_T)
    count_S = np.bincount(set_T[grams.text_M], grams.count_M, sets)
    own_T = np.bincount(grams.text_M, grams.count_M, texts)
    alone_T = np.bincount(grams.text_M, holders_K[slot_M] == 1, texts)
    return count_S, np.bincount(set_K, minlength=sets), own_T, alone_T


def _slots(grams: Grams, set_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The set of each of the K n-grams of sets, which of them an entry is [M], and how many texts have it [K]."""
    bound = int(grams.gram_M.max(initial=0)) + 1
    key_K, slot_M, holders_K = np.unique(
        set_T[grams.text_M] * bound + grams.gram_M, return_inverse=True, return_counts=True
    )
    return key_K // bound, slot_M, holders_K


def _sizes(set_T: np.ndarray) -> np.ndarray:
    """How many texts each set has; one empty set where there is no text."""
    return np.bincount(set_T, minlength=1)


def _distinct(count: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    return np.where(count > 0, kinds / np.maximum(count, 1), 0.0)


def _ead(count: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    v = float(EAD_VOCABULARY)
    expected = v * (1 - ((v - 1) / v) ** np.maximum(count, 1))
    return np.where(count > 0, kinds / expected, 0.0)


def _cosine(grams: Grams, set_T: np.ndarray) -> Measured:
    """With u_t a text's counts at length 1, all pairs' cosines in a set sum to (|sum u_t|^2 - sum |u_t|^2) / 2."""
    set_K, slot_M, _ = _slots(grams, set_T)
    size_S, texts = _sizes(set_T), len(set_T)
    norm_T = np.sqrt(np.bincount(grams.text_M, grams.count_M**2, texts))
    unit_M = grams.count_M / norm_T[grams.text_M]
    sum_K = np.bincount(slot_M, unit_M)
    with_others_T = np.bincount(grams.text_M, unit_M * (sum_K[slot_M] - unit_M), texts)
    total_S = np.bincount(set_T, with_others_T, len(size_S)) / 2
    whole_S = _one_minus_mean(total_S, size_S, 0.0)
    return Measured(whole_S, _one_minus_mean(total_S[set_T] - with_others_T, size_S[set_T] - 1, whole_S[set_T]))


def _one_minus_mean(total: np.ndarray, size: np.ndarray, alone: float | np.ndarray) -> np.ndarray:
    """1 - mean over pairs, and `alone` where there is no pair."""
    pairs = size * (size - 1) / 2
    return np.where(pairs > 0, np.clip(1 - total / np.maximum(pairs, 1), 0.0, 1.0), alone)
