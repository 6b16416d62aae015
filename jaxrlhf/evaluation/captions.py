"""What figures show and how sure it is, in sentences made from their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from jaxrlhf.evaluation import figures, findings
from jaxrlhf.evaluation.figures import Estimate
from jaxrlhf.evaluation.findings import Found


def sure(found: Found) -> str:
    """How many prompts are behind the intervals."""
    held = [
        m["n_prompts"] for splits in found.results["policies"].values() for m in splits.values() if "n_prompts" in m
    ]
    if not held:
        return "Lines are 95 % intervals."
    prompts = f"{min(held):,}" if min(held) == max(held) else f"{min(held):,} to {max(held):,}"
    return f"Lines are 95 % intervals over {prompts} prompts a split, for one training run of each policy."


def accuracy(held: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """On how many splits the reward model agrees with each judge more often than chance."""
    said = []
    for judge, by_split in held.items():
        above = [s for s, e in by_split.items() if e["low"] > 0.5]
        least = min(by_split, key=lambda s: by_split[s]["mean"])
        said.append(
            f"With {judge} it agrees more often than chance on {len(above)} of {len(by_split)} splits, and least on "
            f"{findings.split_label(least)}: {findings.estimate(by_split[least])}."
        )
    return said


def curves(stage: str, rows: Sequence[Mapping[str, float]]) -> list[str]:
    """From where to where the first curve of each panel goes."""
    ways = []
    for _, wanted in figures.CURVES[stage]:
        keys = [k for row in rows for k in row if fnmatchcase(k, f"{stage}/{wanted[0]}")]
        points = [(r["step"], r[keys[0]]) for r in rows if keys[0] in r] if keys else []
        if len(points) > 1:
            (first, start), (last, end) = points[0], points[-1]
            name = wanted[0].replace("_", " ")
            ways.append(f"{name} {_rounded(start)} at step {first}, {_rounded(end)} at step {last}")
    return [f"First and last as logged: {'; '.join(ways)}. One run, one seed: a curve has no interval."] if ways else []


def sweep(found: Found) -> list[str]:
    """From one end of a sweep to the other, each policy's main numbers on the first split."""
    swept, said = found.results["sweep"], []
    split = next(iter(found.splits))
    for place in (p for p in (findings.performance(found), findings.variety(found)) if p):
        for policy, points in findings.swept(found, "values", place, split).items():
            (low, first), (high, last) = points[0], points[-1]
            if len(points) > 1 and first != last:
                said.append(
                    f"From {swept['key']} {low:g} to {high:g}, {figures.label(place)} of {policy} on "
                    f"{found.splits[split]} goes from {findings.estimate(first)} to {findings.estimate(last)}."
                )
    return said


def _rounded(x: object) -> str:
    return f"{x:.3g}" if isinstance(x, int | float) else str(x)
