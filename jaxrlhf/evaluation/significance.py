"""Comparisons judged together: p-values, Holm's correction, and how many items would settle what is not settled."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from jaxrlhf.evaluation.measures import BY_BLOCKS, CUT, Place, Tree, put, walk
from jaxrlhf.evaluation.statistics import BLOCKS, ROUNDING, Estimate, student_quantile

LEVEL, POWER = 0.05, 0.8
MOST = 1_000_000  # items that anyone could be advised to take


def corrected(trees: Sequence[Mapping[str, Any]], null: float = 0.0) -> list[Tree]:
    """The trees with what each estimate decides, judged together with the estimates at the same place of all trees.

    Each estimate gets "p" (`p_value`), "p_holm" (`holm`) and "family", the number of comparisons in its family; and
    where p_holm is not below .05, "n_needed": how many items would settle it (`needed`), unless nobody could take so
    many. The undecided are judged at .05 over the number of those in the family, for that is where Holm's procedure
    stopped. Of across-input diversity, which itself moves with the number of texts, `n_needed` is a rough guide.
    """
    families: dict[Place, list[tuple[int, Estimate]]] = {}
    for i, tree in enumerate(trees):
        for place, e in walk(tree):
            families.setdefault(place, []).append((i, e))
    told = [copy.deepcopy(dict(tree)) for tree in trees]
    for place, family in families.items():
        p_K = [p_value(e, null, _freedom(place, e)) for _, e in family]
        holm_K = holm(p_K)
        undecided = sum(p >= LEVEL for p in holm_K)
        for (i, e), p, p_holm in zip(family, p_K, holm_K, strict=True):
            n = needed(e["n"], p, LEVEL / undecided) if p_holm >= LEVEL else None
            more = {"n_needed": n} if n else {}
            # A comparison of several runs judges anew what each run had judged alone.
            bare = {k: v for k, v in e.items() if k != "n_needed"}
            put(told[i], place, bare | {"p": p, "p_holm": p_holm, "family": len(family)} | more)
    return told


def corrected_gaps(gaps: Mapping[str, Mapping[str, Tree]]) -> dict[str, dict[str, Tree]]:
    """`corrected`, of policy -> split -> gaps."""
    told = iter(corrected([tree for splits in gaps.values() for tree in splits.values()]))
    return {policy: {split: next(told) for split in splits} for policy, splits in gaps.items()}


def p_value(e: Estimate, null: float, df: float) -> float:
    """Two-sided p of an estimate: below .05 exactly where its 95 % interval leaves `null` out.

    The p of a Student's t with `df` degrees of freedom whose 97.5 % point is the interval's half on the side of `null`
    (Altman & Bland 2011); 2,000 resamples alone could not say less than .0005, too much for many comparisons. Where the
    items do not vary at all, as few or discrete ones may, nothing is known of how they would: then the p of the sign
    test, 2^(1 - n).
    """
    from scipy.special import stdtr

    off = e["mean"] - null
    half = e["mean"] - e["low"] if off > 0 else e["high"] - e["mean"]
    if abs(off) < ROUNDING:
        return 1.0
    if half <= 1e-9 * abs(off):
        return 2.0 ** (1 - e["n"])
    return min(1.0, 2 * float(stdtr(df, -student_quantile(df) * abs(off) / half)))


def holm(p_K: Sequence[float]) -> list[float]:
    """P-values adjusted so that all below .05 hold together with 95 % confidence, however they depend (Holm 1979)."""
    order_K = np.argsort(p_K, kind="stable")
    scaled_K = np.asarray(p_K)[order_K] * np.arange(len(p_K), 0, -1)
    adjusted_K = np.empty(len(p_K))
    adjusted_K[order_K] = np.minimum(np.maximum.accumulate(scaled_K), 1.0)
    return adjusted_K.tolist()


def needed(n: float, p: float, level: float = LEVEL) -> int | None:
    """Items that would settle it at two-sided `level` with 80 % power, if the difference is the one seen.

    n ((z_(1 - level/2) + z_.8) / z)^2, where z = |mean| / se is the normal deviate of `p`; None where there is no
    difference or the number is beyond a million.
    """
    normal = NormalDist()
    z = -normal.inv_cdf(p / 2)
    if z <= 0:
        return None
    items = n * ((normal.inv_cdf(1 - level / 2) + normal.inv_cdf(POWER)) / z) ** 2
    return math.ceil(items) if items <= MOST else None


def _freedom(place: Place, e: Estimate) -> float:
    across = "across_input" in place and place[-1].removesuffix(CUT) in BY_BLOCKS
    return max(1, (min(BLOCKS, e["n"]) if across else e["n"]) - 1)
