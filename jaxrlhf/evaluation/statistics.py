"""Estimates with their 95 % interval and the number of items behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Estimate = dict[str, float]
Limits = tuple[float, float]
ANY: Limits = (-math.inf, math.inf)
Z = 1.959963984540054  # 97.5 % point of the normal distribution
LEAST_ERROR = 0.25  # of a resample, as a share of the sample's
ROUNDING = 1e-12
TOGETHER = 512  # sets that are resampled together
BLOCKS = 10
T9 = 2.2621571627409915  # that of Student's with BLOCKS - 1 degrees of freedom


def mean_estimate(values: np.ndarray, resamples: int = 2000, seed: int = 0, limits: Limits = ANY) -> Estimate:
    """Mean of independent items with its bootstrap-t interval: {"mean", "low", "high", "n"}; see `mean_intervals`.

    Items are prompts: where a prompt has several samples, its item is their mean, which clusters them. The same seed
    resamples the same items; the estimate of a paired difference is that of the items' own differences. `limits` are
    the least and the greatest value that an item can take. A single item has an interval of no width.
    """
    return mean_estimates([values], [limits], resamples, seed)[0]


def mean_estimates(
    sets: Sequence[np.ndarray], limits: Sequence[Limits], resamples: int = 2000, seed: int = 0
) -> list[Estimate]:
    """`mean_estimate` of each set; those of one size are resampled together, which is many times faster."""
    found: list[Estimate] = [{} for _ in sets]
    by_size: dict[int, list[int]] = {}
    for i, values in enumerate(sets):
        by_size.setdefault(len(values), []).append(i)
    for n, where in ((n, held[k : k + TOGETHER]) for n, held in by_size.items() for k in range(0, len(held), TOGETHER)):
        values_BS = np.stack([np.asarray(sets[i], np.float64) for i in where], axis=1)
        rows = np.stack(mean_intervals(values_BS, resamples, seed), axis=1).tolist()
        for i, (mean, low, high) in zip(where, rows, strict=True):
            low, high = min(max(low, limits[i][0]), mean), max(min(high, limits[i][1]), mean)
            found[i] = {"mean": mean, "low": low, "high": high, "n": n}
    return found


def difference_estimate(a: np.ndarray, b: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """mean(a) - mean(b) of two independent sets of items, bootstrapped apart; n is the smaller set's size."""
    a_A1, b_B1 = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[:, None]
    mean, low, high = (float(x[0]) for x in difference_intervals(a_A1, b_B1, resamples, seed))
    return {"mean": mean, "low": low, "high": high, "n": min(len(a_A1), len(b_B1))}


def mean_intervals(values_BS: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Mean, low and high [S] of S sets of B items each, by the symmetric bootstrap-t (Hall 1988).

    A resample says how far its mean is from the sample's in its own standard errors; the interval is the mean +- the
    95 % point of that distance, where Student's t would have a number that knows nothing of the items. At n = 100 it
    holds the mean of lognormal, clustered or often equal items 93 to 97 % of the time, where the percentile interval
    of the more skewed ones is at 92 to 93 %, and the equal-tailed bootstrap-t of items that are mostly 0 at 87 to 92 %
    (`tests/test_coverage.py`); of items that are 0 in 85 of 100 cases it is at 93 to 98 %. Of skewed items it misses
    more on the side of the long tail. As any interval from a sample alone, it is too short where one item in a hundred
    decides the mean.
    """
    return _studentised(*_resampled(values_BS, resamples, seed))


def difference_intervals(
    a_AS: np.ndarray, b_BS: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """As `mean_intervals`, of mean(a) - mean(b) of independent sets."""
    mean_a, var_a, shift_a, redrawn_a = _resampled(a_AS, resamples, seed)
    mean_b, var_b, shift_b, redrawn_b = _resampled(b_BS, resamples, seed + 1)
    return _studentised(mean_a - mean_b, var_a + var_b, shift_a - shift_b, redrawn_a + redrawn_b)


def win_rate(outcomes: np.ndarray) -> Estimate:
    """Mean outcome in [0, 1] (win 1, draw .5, loss 0) with its standard error, sd(ddof=1) / sqrt(n), as `alpaca_eval`.

    The interval is Wilson's. Draws, and outcomes that are means over samples, spread less than wins and losses of the
    same mean p would; they count as so many more items as make up for it, n p (1 - p) / variance (the effective sample
    size of Korn & Graubard 1998 in the interval of Wilson 1927). Where all outcomes are the same, nothing is known of
    how they spread, and they count as wins and losses would: draws alone are no certainty of a draw. One item has se 0.
    """
    outcomes = np.asarray(outcomes, np.float64)
    n, p, variance = len(outcomes), float(outcomes.mean()), float(outcomes.var())
    # Variance is p (1 - p) but for rounding where every outcome is a win or a loss.
    plain = variance < ROUNDING or np.isin(outcomes, (0.0, 1.0)).all()
    low, high = _score_interval(p, n if plain else n * p * (1 - p) / variance)
    se = float(outcomes.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return {"mean": p, "low": low, "high": high, "n": n, "se": se}


def wilson(wins: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927)."""
    low, high = _score_interval(wins / n, n)
    return {"mean": wins / n, "low": low, "high": high, "n": n}


def over_seeds(means: Sequence[float], limits: Limits = ANY) -> Estimate:
    """Mean of one number of each of several runs with Student's t interval; n is the number of runs, "se" its error.

    The runs are the items, whatever they measured it on. Where they share their prompts, the interval says where
    further seeds on these prompts would lie, not on others: how much prompts vary is in each run's own interval. One
    run has no interval over seeds: "low" and "high" are absent. `limits` are the least and greatest value possible.
    """
    n, mean = len(means), float(np.mean(means))
    if n == 1:
        return {"mean": mean, "n": 1}
    se = float(np.std(means, ddof=1)) / math.sqrt(n)
    half = student_quantile(n - 1) * se
    low, high = max(mean - half, limits[0]), min(mean + half, limits[1])
    return {"mean": mean, "low": min(low, mean), "high": max(high, mean), "n": n, "se": se}


def student_quantile(df: float) -> float:
    """The 97.5 % point of Student's t with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.975))


def jackknife(whole: float, without: np.ndarray, limits: Limits = ANY, resamples: int = 2000) -> Estimate:
    """A statistic of a set, from its value on the whole set and without each item; see `around` and `pseudo`."""
    return around(whole, mean_estimate(pseudo(without), resamples), limits)


def pseudo(without_B: np.ndarray) -> np.ndarray:
    """Values whose mean has the error of the statistic that was taken without each item (Tukey 1958), signs aside.

    Their mean's interval is so wide as the statistic's is: by their bootstrap-t, which sees how skewed the items'
    influence is, where z times the jackknife error would not.

    The bootstrap of the items would repeat them, and a set with repeats is less diverse, whatever it was drawn from;
    leaving one out has no such bias, and its variance errs upwards (Efron & Stein 1981). As any interval from a sample
    alone, it is too short where a rare item decides the statistic, such as the one output in 800 that repeats itself
    for ever: the 3-gram cosine of short texts that hardly share a 3-gram has intervals that hold the truth a third of
    the time or never.
    """
    return (len(without_B) - 1) * np.asarray(without_B, np.float64)


def around(whole: float, e: Estimate, limits: Limits = ANY) -> Estimate:
    """An estimate `whole`, as far from its ends as the mean of `e` is; `limits` are what it can be at least and most.

    Below a finite greatest value the interval is symmetric in log(greatest - statistic): close to it a statistic is
    skewed, and a symmetric interval of the 3-gram cosine of real outputs holds the truth 80 to 90 % of the time. No
    width is left where every value is the same: two texts, or texts with nothing in common.
    """
    spread, (least, greatest) = (e["high"] - e["low"]) / 2, limits
    room = greatest - whole
    if 0 < room < math.inf:
        factor = math.exp(min(spread / room, 100.0))
        low, high = greatest - room * factor, greatest - room / factor
    else:
        low, high = whole - spread, whole + spread
    return {"mean": whole, "low": max(min(low, whole), least), "high": min(max(high, whole), greatest), "n": e["n"]}


def narrowed(without_B: np.ndarray, pairs: float) -> np.ndarray:
    """Values for `jackknife` whose variance V has become V^2 / (V + pairs).

    `pairs` sums, over pairs of items, the square of S - S_-i - S_-j + S_-ij. The jackknife counts what k items do
    together k times; it sums to V1 + 2 V2 + 3 V3 ..., and `pairs` to V2 + 3 V3 + ... (Efron & Stein 1981). V - pairs is
    right to the second order, but can fall below 0; this agrees with it to that order and cannot. Of the kinds of word
    of a set, of which one is met L times on average, V is L e^-L, the truth is e^-L (1 - e^-L), and this is within
    6 % of that up to L = 1 and 44 % above it at L = 5. Without it, intervals of outputs that often repeat each other's
    words hold the truth 97 to 99 % of the time; where they seldom do, it can make an interval that was right a little
    too short (`tests/test_coverage.py` has the figures).
    """
    off_B = without_B - without_B.mean()
    variance = (len(off_B) - 1) / len(off_B) * float((off_B**2).sum())
    return without_B if variance == 0 else without_B.mean() + off_B * math.sqrt(variance / (variance + pairs))


def blocks(rank_B: np.ndarray) -> np.ndarray:
    """A block for each item, 10 of equal sizes or an item each where there are fewer; `rank_B` orders the items."""
    n = len(rank_B)
    return rank_B * min(BLOCKS, n) // n


def over_items(without_G: np.ndarray, block_B: np.ndarray) -> np.ndarray:
    """[B] values that give `jackknife` the interval from leaving out one block of items at a time (Kunsch 1989).

    A block moves a statistic as all its items together; each gets an equal part of the block's squared deviation, and
    Student's quantile for 9 degrees of freedom instead of the normal one. With one item a block these are the values
    themselves. Values of two statistics over the same blocks can be subtracted.
    """
    groups, items = len(without_G), len(block_B)
    if groups == items:
        return without_G[block_B]
    size_G = np.bincount(block_B, minlength=groups)
    scale_G = T9 / Z * np.sqrt((groups - 1) / groups * items / (items - 1) / size_G)
    return (without_G.mean() + (without_G - without_G.mean()) * scale_G)[block_B]


def _score_interval(p: float, n: float) -> tuple[float, float]:
    scale = 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / scale
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def _resampled(values_BS: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Of each set: mean and its squared error [S]; of each resample: how far its mean is off, and the same [R, S]."""
    n = len(values_BS)
    mean_S = values_BS.mean(0)
    off_BS = values_BS - mean_S
    rng = np.random.default_rng([seed, n])
    means, squares = [], []
    # In blocks: 2,000 x 10,000 indices at once would take 160 MB.
    for block in np.array_split(np.arange(resamples), max(1, resamples * n // 2_000_000)):
        index_RB = rng.integers(0, n, (len(block), n)) + n * np.arange(len(block))[:, None]
        share_RB = np.bincount(index_RB.ravel(), minlength=index_RB.size).reshape(index_RB.shape) / n
        means.append(share_RB @ off_BS)
        squares.append(share_RB @ off_BS**2)
    shift_RS = np.concatenate(means)
    spread_RS = np.maximum(np.concatenate(squares) - shift_RS**2, 0.0)
    return mean_S, (off_BS**2).mean(0) / max(n - 1, 1), shift_RS, spread_RS / max(n - 1, 1)


def _studentised(
    mean_S: np.ndarray, var_S: np.ndarray, shift_RS: np.ndarray, var_RS: np.ndarray
) -> tuple[np.ndarray, ...]:
    # Resamples that happen to hold one value many times would make intervals without end.
    least_S = np.maximum(LEAST_ERROR**2 * var_S, np.finfo(np.float64).tiny)
    far_S = np.quantile(np.abs(shift_RS) / np.sqrt(np.maximum(var_RS, least_S)), 0.95, axis=0)
    half_S = far_S * np.sqrt(var_S)
    return mean_S, mean_S - half_S, mean_S + half_S
