"""How much of a win rate is length: win rates by length difference, and a win rate at equal length."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrlhf.evaluation.statistics import Estimate, win_rate

RIDGE = 0.1  # prior precision of both coefficients: keeps verdicts that length decides alone finite
THIRDS = ("first_third", "second_third", "last_third")


def estimates(won_B: np.ndarray, longer_B: np.ndarray, resamples: int, by_length: bool = False) -> dict[str, Any]:
    """What results.json says of length beside a win rate.

    Args:
      won_B: outcome of each prompt, 1 win, .5 draw, 0 loss.
      longer_B: how many characters the response is longer than the one it is compared with.
      resamples: of the bootstrap.
      by_length: whether length itself is the judge.

    Returns:
      `length_controlled`, but for a judge that is length itself; and where there are at least three prompts
      `win_rate_by_length`: the win rate on the third of the prompts where the response is longer by the least (or
      shorter by the most), on the next, and on the last. Equal lengths on a border go by the order of the items.
    """
    # Of a judge that goes by which is longer, a step at 0, a smooth curve leaves a quality over that nobody has.
    found: dict[str, Any] = {} if by_length else {"length_controlled": length_controlled(won_B, longer_B, resamples)}
    if len(won_B) >= len(THIRDS):
        thirds = np.array_split(np.argsort(longer_B, kind="stable"), len(THIRDS))
        found["win_rate_by_length"] = {name: win_rate(won_B[third]) for name, third in zip(THIRDS, thirds, strict=True)}
    return found


def length_controlled(won_B: np.ndarray, longer_B: np.ndarray, resamples: int, seed: int = 0) -> Estimate:
    """The win rate that responses of the reference's length would have: {"mean", "low", "high", "n", "se"}.

    The logistic model of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without one of its terms:

        P(win) = sigmoid(quality + bias * tanh(difference / sd(difference)))

    fitted to the outcomes by maximum likelihood with a ridge of 0.1 on both coefficients, and evaluated at difference
    0: sigmoid(quality), in (0, 1). AlpacaEval 2 also has a term for how hard each instruction is, fitted over the
    verdicts on many models, and chooses its ridge by cross-validation; one policy alone tells nothing of the first, and
    the second would make the number depend on folds. The interval and `se` are bootstrapped over prompts.

    It takes out a smooth influence of length only: a judge that takes the longer one however little longer it is gets
    0.62 to 0.68 here on real files, with an interval that leaves 0.5 out.
    """
    won_B, longer_B = np.asarray(won_B, np.float64), np.asarray(longer_B, np.float64)
    n = len(won_B)
    start = _fit(won_B[None], _squash(longer_B[None]), np.zeros((2, 1)))
    mean = float(_sigmoid(start[0, 0]))
    rng = np.random.default_rng([seed, n])
    draws = []
    # In blocks that stay in a core's cache: three times as fast as one that does not.
    for block in np.array_split(np.arange(resamples), max(1, resamples * n // 100_000)):
        index_RB = rng.integers(0, n, (len(block), n))
        fitted = _fit(won_B[index_RB], _squash(longer_B[index_RB]), np.repeat(start, len(block), axis=1))
        draws.append(_sigmoid(fitted[0]))
    drawn = np.concatenate(draws)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "mean": mean,
        "low": min(float(low), mean),
        "high": max(float(high), mean),
        "n": n,
        "se": float(drawn.std()),
    }


def _fit(won_RB: np.ndarray, x_RB: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Quality and bias [2, R] of each of R sets of outcomes, by Newton's method from `start`."""
    quality_R, bias_R = start.copy()
    for _ in range(50):
        p_RB = _sigmoid(quality_R[:, None] + bias_R[:, None] * x_RB)
        left_RB, weight_RB = won_RB - p_RB, p_RB * (1 - p_RB)
        slope_quality = left_RB.sum(1) - RIDGE * quality_R
        slope_bias = (left_RB * x_RB).sum(1) - RIDGE * bias_R
        weighted_RB = weight_RB * x_RB
        a, b, d = weight_RB.sum(1) + RIDGE, weighted_RB.sum(1), (weighted_RB * x_RB).sum(1) + RIDGE
        det = a * d - b * b
        step_quality = (d * slope_quality - b * slope_bias) / det
        step_bias = (a * slope_bias - b * slope_quality) / det
        # A full step from far away can overshoot to where the curve is flat.
        largest = np.maximum(np.abs(step_quality), np.abs(step_bias))
        scale = np.minimum(1.0, 2.0 / np.maximum(largest, 1e-12))
        quality_R, bias_R = quality_R + scale * step_quality, bias_R + scale * step_bias
        if largest.max() < 1e-4:  # Newton's next step would be of its square
            break
    return np.stack([quality_R, bias_R])


def _squash(longer_RB: np.ndarray) -> np.ndarray:
    """Length differences in (-1, 1), by the tanh of AlpacaEval 2; 0 where all differences are the same."""
    sd_R1 = longer_RB.std(1, keepdims=True)
    return np.tanh(np.where(sd_R1 > 0, longer_RB / np.where(sd_R1 > 0, sd_R1, 1.0), 0.0))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
