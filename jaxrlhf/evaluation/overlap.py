"""How little the texts of a set repeat each other: Self-BLEU and the compression ratio.

Axis letters as in `ngrams`: T texts, S sets, M n-grams that a text has, K n-grams that a set has; P pairs of texts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.evaluation.ngrams import Grams, OfSets, Pairs, count, sizes, slots

BLEU_ORDERS = 4
SMOOTHING = 0.1  # matches of an order that has n-grams but no match


@dataclass(frozen=True)
class _Lost:
    """What texts lose when another text leaves their set: `text_P` loses `matches_P` n-grams with `other_P`."""

    text_P: np.ndarray
    other_P: np.ndarray
    matches_P: np.ndarray


def self_bleu(texts: Sequence[str], paper_compat: bool = False) -> float:
    """1 - Self-BLEU (Zhu et al. 2018, Texygen), so that more is more varied. In [0, 1]; 0 for one text.

    Self-BLEU is the mean over texts of BLEU-4 (Papineni et al. 2002) with all others as references: the geometric mean
    over n = 1 to 4 of the share of n-grams that are in a reference, none counted more often than the reference that has
    it most often, times exp(1 - r/c) where the reference nearest in length (r) is longer than the text (c). An order
    without a match counts 0.1 matches (Chen & Cherry 2014, method 1); an order that the text is too short for is left
    out; a text with no word in common with the others, such as an empty one, has BLEU 0.
    """
    return float(self_bleu_of_sets(count(texts, paper_compat), np.zeros(len(texts), np.int64)).of_set_S[0])


def compression(texts: Sequence[str]) -> float:
    """Compressed over original bytes of the texts, one a line, by zlib's level 6: the inverse of the compression ratio.

    Shaib et al. (2024) put original over compressed; inverted, more is more varied. Above 0, and over 1 for a few
    letters only; 0 where there is no text. Texts are sorted first, as their order moves it. It falls with the length of
    the texts and with their number, and sees repeats that are at most 32 KiB apart.
    """
    data = "\n".join(sorted(texts)).encode("utf-8", "surrogatepass")
    return len(zlib.compress(data, 6)) / len(data) if data else 0.0


def self_bleu_of_sets(orders: Sequence[Grams], set_T: np.ndarray) -> OfSets:
    """`self_bleu` of the sets that `set_T` names, and of each text's set without that text."""
    texts, size_S = len(set_T), sizes(set_T)
    length_T = np.bincount(orders[0].text_M, orders[0].count_M, texts)
    found = [_matches(grams, set_T) for grams in orders[:BLEU_ORDERS]]
    matches_nT = np.array([matches_T for matches_T, _ in found])
    nearest_T, near_T, next_T = _references(length_T, set_T)
    bleu_T = _bleu(matches_nT, length_T, nearest_T)
    total_S = np.bincount(set_T, bleu_T, len(size_S))
    whole_S = np.where(size_S > 1, 1 - total_S / np.maximum(size_S, 1), 0.0)

    # Without a text, BLEU changes of those alone that it gave a match that no other gives, or the nearest length.
    lost = [lost for _, lost in found]
    key_P = np.concatenate([lo.text_P * texts + lo.other_P for lo in lost] + [np.arange(texts) * texts + near_T])
    key_P, index = np.unique(key_P, return_inverse=True)
    text_P, other_P = key_P // max(texts, 1), key_P % max(texts, 1)
    matches_nP = matches_nT[:, text_P]
    for n, (part, lo) in enumerate(zip(_parts(index, [len(lo.text_P) for lo in lost]), lost, strict=False)):
        matches_nP[n] -= np.bincount(part, lo.matches_P, len(key_P))
    length_P = np.where(other_P == near_T[text_P], next_T[text_P], nearest_T[text_P])
    change_P = _bleu(matches_nP, length_T[text_P], length_P) - bleu_T[text_P]
    others_T = total_S[set_T] - bleu_T + np.bincount(other_P, change_P, texts)
    left_T = size_S[set_T] - 1
    without_T = np.where(left_T > 1, 1 - others_T / np.maximum(left_T, 1), whole_S[set_T])
    # What goes from a third text's BLEU with two others, but with neither alone, is left out of the pairs.
    return OfSets(whole_S, without_T, Pairs(text_P, other_P, change_P / size_S[set_T[text_P]]))


def _bleu(matches_nT: np.ndarray, length_T: np.ndarray, reference_T: np.ndarray) -> np.ndarray:
    """BLEU of texts from their matches of each order, their lengths and their references' lengths."""
    total_nT = np.maximum(length_T - np.arange(BLEU_ORDERS)[:, None], 0)
    matched_nT = np.where(matches_nT > 0, matches_nT, SMOOTHING)
    log_nT = np.where(total_nT > 0, np.log(matched_nT / np.maximum(total_nT, 1)), 0.0)
    log_T = log_nT.sum(0) / np.maximum((total_nT > 0).sum(0), 1)
    brevity_T = np.minimum(1 - reference_T / np.maximum(length_T, 1), 0.0)
    return np.where(matches_nT[0] > 0, np.exp(log_T + brevity_T), 0.0)


def _matches(grams: Grams, set_T: np.ndarray) -> tuple[np.ndarray, _Lost]:
    """How many n-grams of each text another text of its set has, and how many of these one other text alone gives."""
    _, slot_M, holders_K = slots(grams, set_T)
    by_count_M = np.lexsort((-grams.count_M, slot_M))
    first_K = np.cumsum(holders_K) - holders_K

    def held(rank: int) -> tuple[np.ndarray, np.ndarray]:
        """The entry with the rank-th largest count of each n-gram of a set, and that count; 0 where there is none."""
        entry_K = by_count_M[np.minimum(first_K + rank, max(len(slot_M) - 1, 0))]
        return entry_K, np.where(holders_K > rank, grams.count_M[entry_K], 0)

    (top_K, _), (second_K, second_count_K), (_, third_count_K) = held(0), held(1), held(2)
    matched_M = grams.count_M.copy()  # another has it as often, but for who has it most often
    matched_M[top_K] = second_count_K
    fewer_K = second_count_K - third_count_K
    lose_K = np.flatnonzero(fewer_K)
    one_P, two_P = grams.text_M[top_K[lose_K]], grams.text_M[second_K[lose_K]]
    lost = _Lost(np.concatenate([one_P, two_P]), np.concatenate([two_P, one_P]), np.tile(fewer_K[lose_K], 2))
    return np.bincount(grams.text_M, matched_M, len(set_T)), lost


def _references(length_T: np.ndarray, set_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each text, the length nearest its own in its set, whose it is, and the nearest without that text.

    Of two lengths equally near, the shorter. Where there is no other text, its own.
    """
    order_T = np.lexsort((length_T, set_T))
    at_T = np.arange(len(set_T))[:, None] + np.array([-2, -1, 1, 2])
    inside_T4 = (at_T >= 0) & (at_T < len(set_T))
    text_T4 = order_T[np.clip(at_T, 0, max(len(set_T) - 1, 0))]
    inside_T4 &= set_T[text_T4] == set_T[order_T][:, None]
    away_T4 = length_T[text_T4] - length_T[order_T][:, None]
    rank_T4 = np.argsort(np.where(inside_T4, 2 * np.abs(away_T4) + (away_T4 > 0), np.inf), axis=1, kind="stable")
    text_T4 = np.where(inside_T4, text_T4, order_T[:, None])
    found_T2 = np.empty((len(set_T), 2), np.int64)
    found_T2[order_T] = np.take_along_axis(text_T4, rank_T4[:, :2], axis=1)
    near_T, next_T = found_T2.T
    return length_T[near_T], near_T, length_T[next_T]


def _parts(array: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    start = 0
    for length in lengths:
        yield array[start : start + length]
        start += length
