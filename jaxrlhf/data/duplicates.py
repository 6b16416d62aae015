"""Near-duplicate texts: word 8-grams compared by Jaccard similarity, exactly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

WORDS = 8
_BITS = 26  # of the table that tells most shingles apart from all of the candidates'
_WORD = re.compile(r"\w+")
_STEP = np.uint64(0x9E3779B97F4A7C15)


def near(candidates: Sequence[str], references: Iterable[str], threshold: float) -> dict[int, tuple[int, float]]:
    """Which candidates have a near-duplicate among the references.

    Texts are compared as sets of 8 words in a row, whatever their case and punctuation; a shorter text is one such. The
    similarity is |A and B| / |A or B| (Broder 1997), computed and not estimated, but for collisions of 64-bit hashes.

    Args:
      candidates: texts that are held in memory, such as those of a test set.
      references: texts that are read once, such as those of a training set.
      threshold: similarity from which texts count, above 0.

    Returns the place of each candidate that has one, with the place of its most similar reference, the first on ties,
    and their similarity.
    """
    known = Hashes()
    sets = [np.unique(shingles(text, known)) for text in candidates]
    if not sets:
        return {}
    sizes = np.array([len(s) for s in sets])
    owners = np.repeat(np.arange(len(sets)), sizes)
    joined = np.concatenate(sets)
    order = np.argsort(joined, kind="stable")
    joined, owners = joined[order], owners[order]
    seen = np.zeros(1 << _BITS, bool)
    seen[_slot(joined)] = True
    best: dict[int, tuple[int, float]] = {}
    for j, text in enumerate(references):
        found = shingles(text, known)
        if not seen[_slot(found)].any():
            continue
        found = np.unique(found)
        maybe = found[seen[_slot(found)]]
        if len(maybe) < threshold * len(found):
            continue  # the intersection is at least threshold times the union, and so times either set
        starts, ends = np.searchsorted(joined, maybe, "left"), np.searchsorted(joined, maybe, "right")
        hits = np.concatenate([owners[a:b] for a, b in zip(starts, ends, strict=True)])
        for i, shared in zip(*np.unique(hits, return_counts=True), strict=True):
            similarity = float(shared / (sizes[i] + len(found) - shared))
            if similarity >= threshold and similarity > best.get(int(i), (0, 0.0))[1]:
                best[int(i)] = (j, similarity)
    return best


class Hashes(dict[str, int]):
    """64-bit hashes of words, signed, kept once they are made."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, signed=True))


def shingles(text: str, known: Hashes) -> np.ndarray:
    """64-bit hashes of each 8 words in a row of a text."""
    words = _WORD.findall(text.casefold()) or [text.strip()]
    hashes = np.array([known[w] for w in words], np.int64).view(np.uint64)
    count = max(len(words) - WORDS + 1, 1)
    mixed = np.full(count, min(len(words), WORDS), np.uint64)
    for k in range(min(len(words), WORDS)):
        mixed = ((mixed * _STEP) ^ (mixed >> np.uint64(29))) + hashes[k : k + count]
    return mixed * _STEP


def _slot(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _BITS)).astype(np.int64)
