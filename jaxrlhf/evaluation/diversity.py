"""How varied a set of texts is: EAD, distinct-n and n-gram cosine.

Per input, the set is the N responses to one prompt; across inputs, one response to each (Kirk et al. 2024, s. 5).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = (1, 2, 3, 4, 5)
COSINE_ORDER = 3
EAD_VOCABULARY = 50_257  # GPT-2's, as in the released code; see `ead`
METRICS = ("ead", "distinct", "cosine")

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
Grams = list[Counter]  # of each order in ORDERS


def words(text: str, paper_compat: bool = False) -> list[str]:
    """Words and punctuation marks of a text.

    With `paper_compat`, as the released code splits: full stops and newlines vanish without leaving a space, and what
    single spaces part is a word.
    """
    if paper_compat:
        return [w for w in text.replace(".", "").replace("\n", "").split(" ") if w]
    return _WORDS.findall(text)


def ngrams(text: str, paper_compat: bool = False) -> Grams:
    """How often each n-gram occurs in a text, for n = 1 to 5."""
    ws = words(text, paper_compat)
    return [Counter(zip(*(ws[i:] for i in range(n)), strict=False)) for n in ORDERS]


def distinct(grams: Sequence[Grams]) -> float:
    """Distinct n-grams over all n-grams of the set, averaged over n = 1 to 5 (Li et al. 2016). In [0, 1]."""
    return float(_distinct(*_totals(grams)).mean())


def ead(grams: Sequence[Grams]) -> float:
    """Expectation-adjusted distinct n-grams (Liu et al. 2022), averaged over n = 1 to 5.

    N / (V (1 - ((V - 1) / V)^C)) with N distinct of C n-grams and V = 50257: the distinct n-grams over the number that
    C draws from V equally likely ones would give. At least 0; as there are more n-grams than V for n > 1, it can
    exceed 1, and across inputs it grows with the length of the texts.
    """
    return float(_ead(*_totals(grams)).mean())


def ngram_cosine(grams: Sequence[Grams]) -> float:
    """Mean over pairs of 1 - cosine of their 3-gram counts (Tevet & Berant 2021). In [0, 1]; 0 for one text.

    A text without 3-grams is like no other.
    """
    return _pair_means(_cosines(grams))[0]


def per_input(grams: Sequence[Sequence[Grams]]) -> dict[str, np.ndarray]:
    """Each metric of each prompt's own responses: arrays [B]. `grams` is [B][N]."""
    functions = {"ead": ead, "distinct": distinct, "cosine": ngram_cosine}
    return {name: np.array([f(sets) for sets in grams]) for name, f in functions.items()}


def across_input(grams: Sequence[Sequence[Grams]]) -> dict[str, tuple[float, np.ndarray]]:
    """Each metric over one response to each prompt, averaged over which response; also without each prompt.

    With N responses a prompt, set j holds response j of every prompt. Returns (value, [B] values without one).
    """
    found: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in METRICS}
    for j in range(min(len(sets) for sets in grams)):
        chosen = [sets[j] for sets in grams]
        counts, kinds = _totals(chosen)
        counts_without, kinds_without = _totals_without(chosen, counts, kinds)
        for name, f in (("ead", _ead), ("distinct", _distinct)):
            found[name].append((float(f(counts, kinds).mean()), f(counts_without, kinds_without).mean(-1)))
        found["cosine"].append(_pair_means(_cosines(chosen)))
    return {
        name: (float(np.mean([v for v, _ in sets])), np.mean([w for _, w in sets], axis=0))
        for name, sets in found.items()
    }


def _totals(grams: Sequence[Grams]) -> tuple[np.ndarray, np.ndarray]:
    """Number of n-grams and of distinct n-grams of a set, for each order: two arrays [5]."""
    counts = [sum(g[o].total() for g in grams) for o in range(len(ORDERS))]
    kinds = [len(set().union(*(g[o] for g in grams))) for o in range(len(ORDERS))]
    return np.array(counts, np.float64), np.array(kinds, np.float64)


def _totals_without(grams: Sequence[Grams], counts: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same with each text left out in turn, [B, 5]: only n-grams that a text alone has go with it."""
    own_counts, own_kinds = np.zeros((len(grams), len(ORDERS))), np.zeros((len(grams), len(ORDERS)))
    for o in range(len(ORDERS)):
        holders = Counter(gram for g in grams for gram in g[o])
        for b, g in enumerate(grams):
            own_counts[b, o] = g[o].total()
            own_kinds[b, o] = sum(holders[gram] == 1 for gram in g[o])
    return counts - own_counts, kinds - own_kinds


def _distinct(counts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, kinds / np.maximum(counts, 1), 0.0)


def _ead(counts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    v = float(EAD_VOCABULARY)
    expected = v * (1 - ((v - 1) / v) ** counts)
    return np.where(counts > 0, kinds / np.where(counts > 0, expected, 1.0), 0.0)


def _cosines(grams: Sequence[Grams]) -> np.ndarray:
    """Cosine similarity of every two texts [B, B]."""
    from scipy.sparse import csr_matrix  # slow to import, and not every command needs it

    order = ORDERS.index(COSINE_ORDER)
    index: dict[tuple[str, ...], int] = {}
    rows, columns, values = [], [], []
    for b, g in enumerate(grams):
        for gram, count in g[order].items():
            rows.append(b)
            columns.append(index.setdefault(gram, len(index)))
            values.append(float(count))
    matrix = csr_matrix((values, (rows, columns)), shape=(len(grams), max(len(index), 1)))
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    products = np.asarray((matrix @ matrix.T).todense())
    scale = np.outer(norm, norm)
    return np.where(scale > 0, products / np.where(scale > 0, scale, 1.0), 0.0)


def _pair_means(similarity: np.ndarray) -> tuple[float, np.ndarray]:
    """1 - mean similarity over pairs, of all texts and without each."""
    n = len(similarity)
    off = similarity - np.diag(np.diag(similarity))
    total, own = off.sum() / 2, off.sum(1)
    pairs, pairs_without = n * (n - 1) / 2, (n - 1) * (n - 2) / 2
    whole = 1 - total / pairs if pairs else 0.0
    without = 1 - (total - own) / pairs_without if pairs_without else np.full(n, whole)
    return float(whole), without
