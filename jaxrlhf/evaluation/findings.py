"""What the numbers of results.json say, in sentences, and no more than their intervals support."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.evaluation.figures import METRICS, SCOPES, Estimate, Look, label
from jaxrlhf.evaluation.measures import ALL, CUT, MOST_EVERY, PROXY, Place, walk
from jaxrlhf.evaluation.significance import LEVEL
from jaxrlhf.names import METHODS

BySplit = Mapping[str, Estimate]
HEADS: Place = ("head-to-head comparison",)
EQUAL: Place = ("comparison at equal length",)
SHORT: dict[Place, str] = {("win_rate",): "win rate", ("length",): "length", PROXY: "proxy score"}
PERFORMANCE: tuple[Place, ...] = (("win_rate",), ("gold",), ("score",), PROXY)  # the first that is there speaks for it
FEW = 3  # policies beside one: what is to be said of more is said of all together
VARIED = ("is more diverse than", "is less diverse than")


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
    """How a verdict reads: "PPO {more} on 2 of 5 splits", or less, or "PPO {same} on any of them"."""

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


def sentences(found: Found) -> dict[str, list[str]]:
    """The findings, for each section of the page."""
    best, varied = performance(found), variety(found)
    well = [p for p in PERFORMANCE[:2] if p in found.places] or [p for p in (best,) if p]
    cut = [p for p in diversities(found) if p[2].endswith(CUT)]
    spread = [p for p in diversities(found) if varied and p[:2] == varied[:2] and p not in cut]
    other = [p for p in diversities(found) if p not in spread + cut]
    few = len(found.looks) <= MOST_EVERY
    met, main = list(heads(found)) if few else pairs(found), [p for p in (varied,) if p]
    return {
        "generalisation": [
            *_told(found, best),
            *_of_pairs(found, well, "does better than", "does worse than"),
            *_of_heads(found, {HEADS: "win_rate"}, pairs(found)),
        ],
        "distance": list(_of_gaps(found, well)),
        "diversity": [
            *_told(found, varied),
            *_of_pairs(found, spread if few else main, *VARIED),
        ],
        "heads": list(_of_heads(found, {HEADS: "win_rate", EQUAL: "length_controlled"}, met)),
        "headline": list(_of_pairs(found, [p for p in (best,) if p], "does better than", "does worse than"))
        + list(_of_pairs(found, main, *VARIED)),
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
        by_mean = sorted((p for p in held if split in held[p]), key=lambda p: -held[p][split]["mean"])
        shown = [p for p in held if p in by_mean] if len(by_mean) <= MOST_EVERY else [by_mean[0], by_mean[-1]]
        told = [f"{estimate(held[p][split])} for {found.looks[p].label}" for p in shown]
        where = {"id": "In distribution", ALL: "Over all prompts"}.get(split, f"On {found.splits[split]}")
        listed = ", ".join(told) if len(shown) == len(by_mean) else f"from {told[0]} to {told[1]}"
        yield f"{where}, {_names([place])}: {listed}."


def _of_pairs(found: Found, places: Sequence[Place], more: str, less: str) -> Iterator[str]:
    for other, subjects in _beside(pairs(found)).items():
        name = found.looks[other].label
        held = {a: {p: differences(found, a, other, p) for p in places} for a in subjects}
        words = Words(f"{more} {name}", f"{less} {name}", f"is not told apart from {name}")
        yield from _all_said(found, held, words)


def _of_gaps(found: Found, places: Sequence[Place]) -> Iterator[str]:
    for other, subjects in list(_beside(pairs(found)).items())[:1]:
        name = found.looks[other].label
        held = {a: {p: differences(found, a, other, ("gap", *p)) for p in places} for a in subjects}
        same = f"is not shown to lose more or less than {name}"
        yield from _all_said(found, held, Words(f"loses more than {name}", f"loses less than {name}", same))


def _of_lone_gaps(found: Found, places: Sequence[Place]) -> Iterator[str]:
    more, less = "does worse than in distribution", "does better than in distribution"
    words = Words(more, less, "is not shown to do better or worse than in distribution")
    yield from _all_said(found, {a: {p: gaps(found, p).get(a, {}) for p in places} for a in found.looks}, words)


def _of_heads(found: Found, parts: Mapping[Place, str], of: Sequence[tuple[str, str]]) -> Iterator[str]:
    by_part = {place: heads(found, part) for place, part in parts.items()}
    for other, subjects in _beside([pair for pair in of if pair in heads(found)]).items():
        name = found.looks[other].label
        held = {a: {p: _from_half(h[a, other]) for p, h in by_part.items() if (a, other) in h} for a in subjects}
        words = Words(f"beats {name}", f"loses to {name}", f"is not told apart from {name}")
        yield from _all_said(found, held, words)


def _beside(of: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The second of each pair -> the first ones."""
    held: dict[str, list[str]] = {}
    for a, b in of:
        held.setdefault(b, []).append(a)
    return held


def _from_half(held: BySplit) -> dict[str, Estimate]:
    return {s: dict(e) | {k: e[k] - 0.5 for k in ("mean", "low", "high")} for s, e in held.items()}


def _bargains(found: Found, best: Place | None, varied: Place | None) -> Iterator[str]:
    if not (best and varied):
        return
    for b, subjects in _beside(pairs(found)).items():
        held = {a: _paid(found, a, b, best, varied) for a in subjects}
        beside = f"Beside {found.looks[b].label},"
        if len(subjects) <= FEW:
            for a, (both, paid, free) in held.items():
                if both:
                    yield (
                        f"{beside} {found.looks[a].label} is better and less diverse on {paid} of {both} splits, and "
                        f"better without a decided loss of diversity on {free}."
                    )
        elif any(both for both, _, _ in held.values()):
            paid = [found.looks[a].label for a, (_, paid, _) in held.items() if paid]
            free = [found.looks[a].label for a, (_, _, free) in held.items() if free]
            yield (
                f"{beside} better and less diverse on some split: {', '.join(paid) or 'none'}; better there without a "
                f"decided loss of diversity: {', '.join(free) or 'none'}."
            )


def _paid(found: Found, a: str, b: str, best: Place, varied: Place) -> tuple[int, int, int]:
    """Splits where something is decided of both measures; there, a better and less diverse; better and not less."""
    does, has = (decide(differences(found, a, b, p)) for p in (best, varied))
    both = [s for side in does for s in side if any(s in other for other in has)]
    both = [s for s in both if s != ALL] or both
    paid = [s for s in both if s in does.above and s in has.below]
    free = [s for s in both if s in does.above and s not in has.below]
    return len(both), len(paid), len(free)


def _all_said(found: Found, held: Mapping[str, Mapping[Place, BySplit]], words: Words) -> Iterator[str]:
    """Sentences on each of a few policies, else one for each measure on all of them."""
    for policy, by_place in held.items() if len(held) <= FEW else ():
        yield from _said(found, found.looks[policy].label, by_place, words)
    if len(held) > FEW:
        for place in dict.fromkeys(p for by_place in held.values() for p in by_place):
            for whole in (True, False):
                told = {a: _part(by_place.get(place, {}), whole) for a, by_place in held.items()}
                yield from _grouped(found, place, {a: part for a, part in told.items() if part}, words)


def _grouped(found: Found, place: Place, held: Mapping[str, BySplit], words: Words) -> Iterator[str]:
    """One sentence that names together the policies of which the same is to be said, the best ones first."""
    groups: dict[tuple[int, int, str], list[str]] = {}
    for policy, part in held.items():
        verdict = decide(part)
        key = (-len(verdict.above), len(verdict.below), _sides(found, verdict, words, named=False))
        groups.setdefault(key, []).append(found.looks[policy].label)
    said = [f"{'each of ' * (len(who) > 1)}{_join(who)} {key[-1]}" for key, who in sorted(groups.items())]
    if said:
        scope = "over all prompts " if all(ALL in part for part in held.values()) else ""
        estimates = [e for part in held.values() for e in part.values()]
        open_ = [part[s] for part in held.values() for s in decide(part).undecided]
        yield f"By {_names([place])}, {scope}{'; '.join(said)}{_many(estimates)}{_advice(found, open_)}."


def _said(found: Found, subject: str, held: Mapping[Place, BySplit], words: Words) -> Iterator[str]:
    """One sentence for all measures that say the same; the split `all` holds the others, so it is not counted in."""
    for whole in (True, False):
        told: dict[tuple[Verdict, float], list[Place]] = {}
        for place, by_split in held.items():
            part = _part(by_split, whole)
            if part:
                family = max(e.get("family", 1) for e in part.values())
                told.setdefault((decide(part), family), []).append(place)
        for (verdict, _), places in told.items():
            scope = "over all prompts " if whole else ""
            estimates = _part(held[places[0]], whole).values()
            open_ = [held[place][s] for place in places for s in verdict.undecided]
            sides = _sides(found, verdict, words)
            yield f"By {_names(places)}, {scope}{subject} {sides}{_many(estimates)}{_advice(found, open_)}."


def _part(by_split: BySplit, whole: bool) -> dict[str, Estimate]:
    return {s: e for s, e in by_split.items() if (s == ALL) == whole}


def _many(estimates: Iterable[Estimate]) -> str:
    family = max(e.get("family", 1) for e in estimates)
    return f", after Holm's correction for {family:,} comparisons" if family > 1 else ""


def _advice(found: Found, undecided: Sequence[Estimate]) -> str:
    """How many prompts, or seeds, would settle differences as large as those seen."""
    sizes = sorted(
        e.get("n_needed", math.inf) for e in undecided if "p_holm" in e and e["mean"] and e["low"] < e["high"]
    )
    if not sizes:
        return ""
    items = "seeds" if found.results["seeds"] else "prompts"
    least, most = (
        "more than a million" if n == math.inf else f"{float(f'{n:.2g}'):,.0f}" for n in (sizes[0], sizes[-1])
    )
    about = "" if sizes[0] == math.inf else "about "
    if len(sizes) == 1 or least == most:
        these = "a difference of this size" if len(sizes) == 1 else "differences of these sizes"
        return f"; {about}{least} {items} would settle {these}"
    return f"; {about}{least} to {most} {items} would settle differences of these sizes"


def _sides(found: Found, verdict: Verdict, words: Words, named: bool = True) -> str:
    n = sum(map(len, verdict))
    if len(verdict.undecided) == n:
        one = "" if verdict.undecided == (ALL,) else f" on {found.splits[verdict.undecided[0]]}"
        return words.same + (f" on any of {n} splits" if n > 1 else one)
    sides = []
    for verb, splits in ((words.more, verdict.above), (words.less, verdict.below)):
        which = f" ({', '.join(found.splits[s] for s in splits)})" if named and len(splits) < n else ""
        sides += (
            [verb if splits == (ALL,) else f"{verb} on {len(splits)} of {n} split{'s' * (n > 1)}{which}"]
            if splits
            else []
        )
    return ("; " if named else ", ").join(sides + [f"{len(verdict.undecided)} undecided"] * bool(verdict.undecided))


def _names(places: Sequence[Place]) -> str:
    scopes = dict.fromkeys(p[1] for p in places if p[0] == "diversity")
    if len(scopes) != 1:
        return _join([SHORT[p] if p in SHORT else label(p) for p in places])
    scope = next(iter(scopes))
    return f"{SCOPES.get(scope, scope)} {_join([METRICS.get(p[2], p[2]) for p in places])}"


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
