"""How well policies do against the reference and head to head, as a judge has it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from jaxrlhf.evaluation.statistics import win_rate


def outcomes(a_BN: np.ndarray, b_BM: np.ndarray) -> np.ndarray:
    """P(a beats b) of each prompt over every pair of its N and M responses, draws counting half. [B]."""
    margin_BNM = a_BN[:, :, None] - b_BM[:, None, :]
    return ((margin_BNM > 0) + 0.5 * (margin_BNM == 0)).mean((1, 2))


def comparisons(judged: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Head to head on each split: how often a's response beats b's to the same prompt.

    `judged` is policy -> split -> the judge's values [B, N].
    """
    return [
        {"split": split, "a": a, "b": b, "win_rate": win_rate(outcomes(judged[a][split], judged[b][split]))}
        for b, a in combinations(judged, 2)
        for split in judged[a]
        if split in judged[b] and len(judged[a][split]) == len(judged[b][split])
    ]
