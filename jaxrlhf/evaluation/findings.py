"""What the numbers of results.json say, in sentences, and no more than their intervals support."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.evaluation.figures import METRICS, SCOPES, Estimate, Look, label
from jaxrlhf.evaluation.measures import CUT, PROXY, Place, against_each_other, walk
from jaxrlhf.evaluation.significance import LEVEL

BySplit = Mapping[str, Estimate]
SHORT: dict[Place, str] = {("win_rate",): "win rate", ("length",): "length", PROXY: "proxy score"}
PERFORMANCE: tuple[Place, ...] = (("win_rate",), ("gold",), ("score",), PROXY)  # the first that is there speaks for it
VARIED = ("is more diverse than", "is less diverse than")
ALL = "all"  # the split that holds all others


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


class Words(NamedTuple):
    """How a verdict reads: "{subject} {more} on 2 of 5 splits", or less, or "{same} on any of them"."""

    subject: str
    more: str
    less: str
    same: str


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


def pairs(found: Found) -> list[tuple[str, str]]:
    """Each policy beside SFT, or beside the first one; PPO beside best-of-N, others beside PPO.

    Where workdirs are compared, each policy beside its namesake; what a run says of itself is in its own report.
    """
    if compared := found.results["compared"]:
        runs = {p: name for name in compared for p in found.looks if p.startswith(f"{name}/")}
        told = dict.fromkeys((d["a"], d["b"]) for d in found.results["differences"])
        return [(a, b) for a, b in told if runs.get(a) != runs.get(b)]
    return list(against_each_other(list(found.looks)))


def estimate(e: Estimate) -> str:
    """Mean and interval, with as many decimals as give the interval's half-width two digits."""
    half = (e["high"] - e["low"]) / 2
    places = min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 3
    # A no-break space, so that a narrow cell breaks before the bracket and not within it.
    return f"{e['mean']:.{places}f} [{e['low']:.{places}f},\N{NO-BREAK SPACE}{e['high']:.{places}f}]"


def number(x: float) -> str:
    """Whole numbers as they are, others to six digits."""
    return f"{x:,}" if isinstance(x, int) else f"{x:.6g}"


def sentences(found: Found) -> dict[str, list[str]]:
    """The findings, for each section of the page."""
    best, varied = performance(found), variety(found)
    well = [p for p in PERFORMANCE[:2] if p in found.places] or [p for p in (best,) if p]
    cut = [p for p in diversities(found) if p[2].endswith(CUT)]
    spread = [p for p in diversities(found) if varied and p[:2] == varied[:2] and p not in cut]
    other = [p for p in diversities(found) if p not in spread + cut]
    return {
        "generalisation": [*_told(found, best), *_of_pairs(found, well, "does better than", "does worse than")],
        "distance": list(_of_gaps(found, well)),
        "diversity": [*_told(found, varied), *_of_pairs(found, spread, *VARIED)],
        "heads": list(_of_heads(found)),
        "headline": list(_of_pairs(found, [p for p in (best,) if p], "does better than", "does worse than"))
        + list(_of_pairs(found, [p for p in (varied,) if p], *VARIED)),
        "measures": list(_of_pairs(found, [p for p in PERFORMANCE if p in found.places], "is above", "is below")),
        "per_input": list(_of_pairs(found, [p for p in spread if p[1] == "per_input"], *VARIED)),
        "length": list(_of_pairs(found, [("length",)], "writes more than", "writes less than")),
        "gap": list(_of_lone_gaps(found, well)),
        "across": list(_of_pairs(found, other, *VARIED)),
        "cut": [s for scope in SCOPES for s in _of_pairs(found, [p for p in cut if p[1] == scope], *VARIED)],
        "tradeoff": list(_bargains(found, best, varied)),
    }


def _told(found: Found, place: Place | None) -> Iterator[str]:
    held = series(found, place) if place else {}
    split = next((s for s in found.splits if any(s in e for e in held.values())), None)
    if place and split is not None:
        told = [f"{estimate(e[split])} for {found.looks[p].label}" for p, e in held.items() if split in e]
        where = {"id": "In distribution", ALL: "Over all prompts"}.get(split, f"On {found.splits[split]}")
        yield f"{where}, {_names([place])}: {', '.join(told)}."


def _of_pairs(found: Found, places: Sequence[Place], more: str, less: str) -> Iterator[str]:
    for a, b in pairs(found):
        one, other = found.looks[a].label, found.looks[b].label
        words = Words(one, f"{more} {other}", f"{less} {other}", f"is not told apart from {other}")
        yield from _said(found, {p: differences(found, a, b, p) for p in places}, words)


def _of_gaps(found: Found, places: Sequence[Place]) -> Iterator[str]:
    for a, b in pairs(found)[: len(found.looks) - 1]:
        one, other = found.looks[a].label, found.looks[b].label
        same = f"is not shown to lose more or less than {other}"
        words = Words(one, f"loses more than {other}", f"loses less than {other}", same)
        yield from _said(found, {p: differences(found, a, b, ("gap", *p)) for p in places}, words)


def _of_lone_gaps(found: Found, places: Sequence[Place]) -> Iterator[str]:
    for policy, look in found.looks.items():
        more, less = "does worse than in distribution", "does better than in distribution"
        words = Words(look.label, more, less, "is not shown to do better or worse than in distribution")
        yield from _said(found, {p: gaps(found, p).get(policy, {}) for p in places}, words)


def _of_heads(found: Found) -> Iterator[str]:
    parts = {("head-to-head comparison",): "win_rate", ("comparison at equal length",): "length_controlled"}
    by_part = {place: heads(found, part) for place, part in parts.items()}
    for a, b in heads(found):
        one, other = found.looks[a].label, found.looks[b].label
        words = Words(one, f"beats {other}", f"loses to {other}", f"and {other} are not told apart")
        yield from _said(found, {p: _from_half(h[a, b]) for p, h in by_part.items() if (a, b) in h}, words)


def _from_half(held: BySplit) -> dict[str, Estimate]:
    return {s: dict(e) | {k: e[k] - 0.5 for k in ("mean", "low", "high")} for s, e in held.items()}


def _bargains(found: Found, best: Place | None, varied: Place | None) -> Iterator[str]:
    if not (best and varied):
        return
    for a, b in pairs(found):
        does, has = (decide(differences(found, a, b, p)) for p in (best, varied))
        both = [s for side in does for s in side if any(s in other for other in has)]
        both = [s for s in both if s != ALL] or both
        if both:
            paid = [s for s in both if s in does.above and s in has.below]
            free = [s for s in both if s in does.above and s not in has.below]
            yield (
                f"Beside {found.looks[b].label}, {found.looks[a].label} is better and less diverse on {len(paid)} of "
                f"{len(both)} splits, and better without a decided loss of diversity on {len(free)}."
            )


def _said(found: Found, held: Mapping[Place, BySplit], words: Words) -> Iterator[str]:
    """One sentence for all measures that say the same; the split `all` holds the others, so it is not counted in."""
    for whole in (True, False):
        told: dict[tuple[Verdict, float], list[Place]] = {}
        for place, by_split in held.items():
            part = {s: e for s, e in by_split.items() if (s == ALL) == whole}
            if part:
                family = max(e.get("family", 1) for e in part.values())
                told.setdefault((decide(part), family), []).append(place)
        for (verdict, family), places in told.items():
            scope = "over all prompts " if whole else ""
            many = f", after Holm's correction for {family} comparisons" if family > 1 else ""
            open_ = [held[place][s] for place in places for s in verdict.undecided]
            yield (
                f"By {_names(places)}, {scope}{words.subject} {_sides(found, verdict, words)}{many}"
                f"{_advice(open_, 'seeds' if found.results['seeds'] else 'prompts')}."
            )


def _advice(undecided: Sequence[Estimate], items: str) -> str:
    """How many prompts, or seeds, would settle differences as large as those seen."""
    sizes = sorted(
        e.get("n_needed", math.inf) for e in undecided if "p_holm" in e and e["mean"] and e["low"] < e["high"]
    )
    if not sizes:
        return ""
    least, most = (
        "more than a million" if n == math.inf else f"{float(f'{n:.2g}'):,.0f}" for n in (sizes[0], sizes[-1])
    )
    about = "" if sizes[0] == math.inf else "about "
    if len(sizes) == 1 or least == most:
        these = "a difference of this size" if len(sizes) == 1 else "differences of these sizes"
        return f"; {about}{least} {items} would settle {these}"
    return f"; {about}{least} to {most} {items} would settle differences of these sizes"


def _sides(found: Found, verdict: Verdict, words: Words) -> str:
    n = sum(map(len, verdict))
    if len(verdict.undecided) == n:
        one = "" if verdict.undecided == (ALL,) else f" on {found.splits[verdict.undecided[0]]}"
        return words.same + (f" on any of {n} splits" if n > 1 else one)
    sides = []
    for verb, splits in ((words.more, verdict.above), (words.less, verdict.below)):
        named = f" ({', '.join(found.splits[s] for s in splits)})" if len(splits) < n else ""
        sides += (
            [verb if splits == (ALL,) else f"{verb} on {len(splits)} of {n} split{'s' * (n > 1)}{named}"]
            if splits
            else []
        )
    return "; ".join(sides + [f"{len(verdict.undecided)} undecided"] * bool(verdict.undecided))


def _names(places: Sequence[Place]) -> str:
    scopes = dict.fromkeys(p[1] for p in places if p[0] == "diversity")
    if len(scopes) != 1:
        return _join([SHORT[p] if p in SHORT else label(p) for p in places])
    scope = next(iter(scopes))
    return f"{SCOPES.get(scope, scope)} {_join([METRICS.get(p[2], p[2]) for p in places])}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
