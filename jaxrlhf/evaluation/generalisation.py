"""How well policies do: against the reference, against each other, and how that changes out of distribution."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from jaxrlhf.evaluation.statistics import Estimate, difference_estimate, mean_estimate, win_rate

# policy -> split -> name of a number -> its value for each prompt, averaged over the prompt's samples.
Values = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]
GAPS = ("win_rate", "score", "gold")


def outcomes(a_BN: np.ndarray, b_BM: np.ndarray) -> np.ndarray:
    """P(a beats b) of each prompt over every pair of its N and M responses, draws counting half. [B]."""
    margin_BNM = a_BN[:, :, None] - b_BM[:, None, :]
    return ((margin_BNM > 0) + 0.5 * (margin_BNM == 0)).mean((1, 2))


def estimates(values: Mapping[str, np.ndarray], resamples: int) -> dict[str, Estimate]:
    """An estimate of each number, over prompts."""
    return {k: (win_rate if k == "win_rate" else mean_estimate)(v, resamples) for k, v in values.items()}


def gaps(values: Values, resamples: int) -> dict[str, dict[str, dict[str, Estimate]]]:
    """In-distribution minus out-of-distribution, of each policy, split and number, as independent sets."""
    return {
        policy: {
            split: {
                k: difference_estimate(splits["id"][k], v[k], resamples) for k in GAPS if k in v and k in splits["id"]
            }
            for split, v in splits.items()
            if split != "id"
        }
        for policy, splits in values.items()
        if "id" in splits
    }


def comparisons(judged: Mapping[str, Mapping[str, np.ndarray]], resamples: int) -> list[dict[str, Any]]:
    """Head to head on each split: how often a's response beats b's to the same prompt.

    `judged` is policy -> split -> the judge's values [B, N].
    """
    return [
        {"split": split, "a": a, "b": b, "win_rate": win_rate(outcomes(judged[a][split], judged[b][split]), resamples)}
        for b, a in combinations(judged, 2)
        for split in judged[a]
        if split in judged[b] and len(judged[a][split]) == len(judged[b][split])
    ]
