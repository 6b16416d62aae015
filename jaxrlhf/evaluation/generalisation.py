"""How well policies do against the reference and head to head, as a judge has it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from jaxrlhf.evaluation import length_bias
from jaxrlhf.evaluation.statistics import win_rate

BySplit = Mapping[str, Mapping[str, np.ndarray]]


def outcomes(a_BN: np.ndarray, b_BM: np.ndarray) -> np.ndarray:
    """P(a beats b) of each prompt over every pair of its N and M responses, draws counting half. [B]."""
    margin_BNM = a_BN[:, :, None] - b_BM[:, None, :]
    return ((margin_BNM > 0) + 0.5 * (margin_BNM == 0)).mean((1, 2))


def comparisons(judged: BySplit, characters: BySplit, resamples: int) -> list[dict[str, Any]]:
    """Head to head on each split: how often a's response beats b's to the same prompt.

    `judged` is policy -> split -> the judge's values [B, N]; `characters` the mean lengths [B] of the same responses.
    """
    return [
        against(
            {"split": split, "a": a, "b": b},
            outcomes(judged[a][split], judged[b][split]),
            characters[a][split] - characters[b][split],
            resamples,
        )
        for b, a in combinations(judged, 2)
        for split in judged[a]
        if split in judged[b] and len(judged[a][split]) == len(judged[b][split])
    ]


def against(
    who: dict[str, str], won_B: np.ndarray, longer_B: np.ndarray, resamples: int, by_length: bool = False
) -> dict[str, Any]:
    """One of the `comparisons`: who, `win_rate`, and what length has to do with it; `by_length` if it is the judge."""
    return who | {"win_rate": win_rate(won_B)} | length_bias.estimates(won_B, longer_B, resamples, by_length)
