"""What results.json holds as the report asks for it: by measure, and what is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxrlhf.evaluation.figures import Estimate, Look
from jaxrlhf.evaluation.measures import CUT, PROXY, Place, walk
from jaxrlhf.evaluation.significance import LEVEL
from jaxrlhf.names import METHODS

BySplit = Mapping[str, Estimate]
PERFORMANCE: tuple[Place, ...] = (("win_rate",), ("gold",), ("score",), PROXY)  # the first that is there speaks for it
FEW = 3  # policies beside one: what is to be said of more is said of all together


class Found(NamedTuple):
    """What results.json holds, and what its policies and splits are called on the page."""

    results: Mapping[str, Any]
    looks: dict[str, Look]
    splits: dict[str, str]  # split -> label, in the order of the page
    places: list[Place]  # what was measured


class Verdict(NamedTuple):
    """Splits on which one policy's number is decidedly above the other's, below it, or neither."""

    above: tuple[str, ...]
    below: tuple[str, ...]
    undecided: tuple[str, ...]


def decide(differences: BySplit) -> Verdict:
    """On which splits a difference's interval excludes 0, also after Holm's correction where results.json has it.

    One item alone has no interval and decides nothing.
    """
    known = {s: e for s, e in differences.items() if e["n"] != 1 and e.get("p_holm", 0.0) < LEVEL}
    above = tuple(s for s, e in known.items() if e["low"] > 0)
    below = tuple(s for s, e in known.items() if e["high"] < 0)
    return Verdict(above, below, tuple(s for s in differences if s not in above + below))


def series(found: Found, place: Place) -> dict[str, dict[str, Estimate]]:
    """Policy -> split -> what was measured at `place`, without what was not measured."""
    held = {
        policy: {s: e for s in found.splits if s in splits for p, e in walk(splits[s]) if p == place}
        for policy, splits in found.results["policies"].items()
    }
    return {policy: splits for policy, splits in held.items() if splits}


def differences(found: Found, a: str, b: str, place: Place) -> dict[str, Estimate]:
    """Split -> a minus b in what was measured at `place`, paired by prompt."""
    told = {d["split"]: d for d in found.results["differences"] if (d["a"], d["b"]) == (a, b)}
    return {s: e for s in found.splits if s in told for p, e in walk(told[s]) if p == place}


def gaps(found: Found, place: Place) -> dict[str, dict[str, Estimate]]:
    """Policy -> split -> in-distribution minus that split."""
    held = {
        policy: {s: e for s in found.splits if s in splits for p, e in walk(splits[s]) if p == place}
        for policy, splits in found.results["generalisation_gap"].items()
        if policy in found.looks
    }
    return {policy: splits for policy, splits in held.items() if splits}


def heads(found: Found, part: str = "win_rate") -> dict[tuple[str, str], dict[str, Estimate]]:
    """(a, b) -> split -> how often a's response is judged better than b's, or would be at equal length."""
    held: dict[tuple[str, str], dict[str, Estimate]] = {}
    for c in found.results["comparisons"]:
        if {c["a"], c["b"]} <= found.looks.keys() and c["split"] in found.splits and part in c:
            held.setdefault((c["a"], c["b"]), {})[c["split"]] = c[part]
    return held


def swept(found: Found, axis: str, place: Place, split: str) -> dict[str, list[tuple[float, Estimate]]]:
    """Policy, without its run's name -> (x, estimate) by x, of compared runs; x is results.json's sweep[axis].

    The KL is PPO's, so over it only PPO is drawn.
    """
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    held = series(found, place)
    for name, x in found.results["sweep"].get(axis, {}).items():
        for policy in (p for p in held if p.startswith(f"{name}/") and split in held[p]):
            bare = policy.removeprefix(f"{name}/")
            if axis == "values" or bare == "ppo":
                lines.setdefault(bare, []).append((x, held[policy][split]))
    return {p: sorted(points, key=lambda point: point[0]) for p, points in lines.items()}


def performance(found: Found) -> Place | None:
    """What speaks for generalisation: the win rate, else the gold reward, else the score."""
    return next((p for p in PERFORMANCE if p in found.places), None)


def split_label(split: str) -> str:
    """What a split is called on the page."""
    return "in-distribution" if split == "id" else split.removeprefix("ood_") or split


def diversities(found: Found) -> list[Place]:
    """Every measure of diversity that was taken."""
    return [p for p in found.places if p[0] == "diversity" and len(p) == 3]


def variety(found: Found) -> Place | None:
    """What speaks for diversity: per input where prompts have several responses, and EAD where it is there."""
    held = diversities(found)
    return min(held, key=lambda p: (p[1] != "per_input", p[2] != "ead"), default=None)


def twin(found: Found, place: Place) -> Place | None:
    """Where the same of texts at equal length lies, if that was measured."""
    cut = (*place[:-1], place[-1] + CUT)
    return cut if cut in found.places else None


def told_pairs(found: Found) -> list[tuple[str, str]]:
    """The pairs of policies whose differences results.json has.

    Where workdirs are compared, those of different runs; what a run says of itself is in its own report.
    """
    told = list(dict.fromkeys((d["a"], d["b"]) for d in found.results["differences"]))
    runs = {p: name for name in found.results["compared"] for p in found.looks if p.startswith(f"{name}/")}
    return [(a, b) for a, b in told if runs.get(a) != runs.get(b)] if runs else told


def pairs(found: Found) -> list[tuple[str, str]]:
    """The pairs that sentences speak of: all of up to three policies, and of compared workdirs.

    Of more policies, each beside SFT or the first one; PPO beside best-of-N; other methods beside PPO.
    """
    told = told_pairs(found)
    if found.results["compared"] or len(found.looks) <= FEW:
        return told
    main = {("ppo", "bon"), *((m, "ppo") for m in METHODS)}
    return [(a, b) for a, b in told if b == told[0][1] or (a, b) in main]


def estimate(e: Estimate) -> str:
    """Mean and interval, with as many decimals as give the interval's half-width two digits."""
    half = (e["high"] - e["low"]) / 2
    places = min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 3
    # A no-break space, so that a narrow cell breaks before the bracket and not within it.
    return f"{e['mean']:.{places}f} [{e['low']:.{places}f},\N{NO-BREAK SPACE}{e['high']:.{places}f}]"


def number(x: float) -> str:
    """Whole numbers as they are, others to six digits."""
    return f"{x:,}" if isinstance(x, int) else f"{x:.6g}"
