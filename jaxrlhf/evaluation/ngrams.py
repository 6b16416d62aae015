"""Texts as words and n-grams, for all metrics that count them.

Axis letters: T texts, S sets, W words of all texts in a row, M n-grams that a text has (each text's own, without
repeats), K n-grams that a set has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

ORDERS = (1, 2, 3, 4, 5)

WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Grams:
    """The n-grams of T texts, for one n."""

    text_M: np.ndarray  # whose
    gram_M: np.ndarray  # which, numbered over all texts
    count_M: np.ndarray  # how often


@dataclass(frozen=True)
class Pairs:
    """By how much a set's metric without two texts, added to that with both, differs from those without one each."""

    one_P: np.ndarray
    two_P: np.ndarray
    value_P: np.ndarray

    def squared(self, item_T: np.ndarray) -> float:
        """The sum of squares over pairs of items, each of which has the texts that `item_T` gives it."""
        one_P, two_P = item_T[self.one_P], item_T[self.two_P]
        key_P = np.minimum(one_P, two_P) * len(item_T) + np.maximum(one_P, two_P)
        _, pair_P = np.unique(key_P, return_inverse=True)
        return float((np.bincount(pair_P, self.value_P) ** 2).sum())


@dataclass(frozen=True)
class OfSets:
    """A metric of every set, and of each text's set without that text; `pairs` where it is known for two texts."""

    of_set_S: np.ndarray
    without_T: np.ndarray
    pairs: Pairs | None = None


def words(text: str, paper_compat: bool = False) -> list[str]:
    """Words and punctuation marks of a text, as they are written: capitals tell words apart.

    With `paper_compat`, as the released code splits: full stops and newlines vanish without leaving a space, and what
    single spaces part is a word.
    """
    if paper_compat:
        return [w for w in text.replace(".", "").replace("\n", "").split(" ") if w]
    return WORDS.findall(text)


def cut(text: str, most: int) -> str:
    """The first `most` words of a text, which are what white space parts; a text with fewer stays as it is."""
    parts = text.split(None, most)
    return text[: len(text) - len(parts[most])].rstrip() if len(parts) > most else text


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


def slots(grams: Grams, set_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The set of each of the K n-grams of sets, which of them an entry is [M], and how many texts have it [K]."""
    bound = int(grams.gram_M.max(initial=0)) + 1
    key_K, slot_M, holders_K = np.unique(
        set_T[grams.text_M] * bound + grams.gram_M, return_inverse=True, return_counts=True
    )
    return key_K // bound, slot_M, holders_K


def sizes(set_T: np.ndarray) -> np.ndarray:
    """How many texts each set has; one empty set where there is no text."""
    return np.bincount(set_T, minlength=1)
