"""What the numbers of results.json say, in sentences, and no more than their intervals support."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.evaluation.figures import METRICS, SCOPES, Estimate, label
from jaxrlhf.evaluation.findings import (
    FEW,
    PERFORMANCE,
    BySplit,
    Found,
    Verdict,
    decide,
    differences,
    diversities,
    estimate,
    gaps,
    heads,
    pairs,
    performance,
    series,
    twin,
    variety,
)
from jaxrlhf.evaluation.measures import ALL, CUT, MOST_EVERY, PROXY, WIN_RATE, Place

HEADS: Place = ("head-to-head comparison",)
EQUAL: Place = ("comparison at equal length",)
SHORT: dict[Place, str] = {("win_rate",): "win rate", ("length",): "length", PROXY: "proxy score"}
VARIED = ("is more diverse than", "is less diverse than")
JUDGED = (WIN_RATE, ("length_controlled",), HEADS, EQUAL)
# Of a judge that tosses a coin on a share u of the pairs and knows the others, both orders agree on 1 - u/2: below .6,
# u is above 4/5. GPT-4 agreed with itself on .65 of MT-bench's hard pairs, GPT-3.5 on .46 (Zheng et al. 2023, table 2).
CONSISTENT = 0.6


Told = Mapping[str, Mapping[Place, BySplit]]  # policy -> measure -> split


class Words(NamedTuple):
    """How a verdict reads: "PPO {more} on 2 of 5 splits", or less, or "PPO {same} on any of them"."""

    more: str
    less: str
    same: str


def of(found: Found) -> dict[str, list[str]]:
    """The sentences of each section of the page."""
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
        cut = series(found, equal) if (equal := twin(found, place)) else {}
        told = [f"{estimate(cut[p][split])} for {found.looks[p].label}" for p in shown if split in cut.get(p, {})]
        equally = f"; at equal length {', '.join(told)}" if told else ""
        yield f"{where}, {_names([place])}: {listed}{equally}{_doubt(found, [place])}."


def _of_pairs(found: Found, places: Sequence[Place], more: str, less: str) -> Iterator[str]:
    for other, subjects in _beside(pairs(found)).items():
        name = found.looks[other].label
        held = {a: {p: differences(found, a, other, p) for p in places} for a in subjects}
        twins = {p: cut for p in places if (cut := twin(found, p))}
        equal = {a: {p: differences(found, a, other, cut) for p, cut in twins.items()} for a in subjects}
        words = Words(f"{more} {name}", f"{less} {name}", f"is not told apart from {name}")
        yield from _all_said(found, held, words, equal)


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
    doubt, equal = _doubt(found, [best]), twin(found, varied)
    for b, subjects in _beside(pairs(found)).items():
        held = {a: _paid(found, a, b, best, varied) for a in subjects}
        cut = {a: _paid(found, a, b, best, equal) for a in subjects} if equal else {}
        beside = f"Beside {found.looks[b].label},"
        if len(subjects) <= FEW:
            for a, (both, paid, free) in held.items():
                if both:
                    n, lost, kept = cut.get(a, (0, 0, 0))
                    equally = f"; at equal length on {lost} of {n} and on {kept}" if n else ""
                    none = "; at equal length nothing is decided of both" if equal and not n else ""
                    yield (
                        f"{beside} {found.looks[a].label} is better and less diverse on {paid} of {both} splits, and "
                        f"better without a decided loss of diversity on {free}{equally}{none}{doubt}."
                    )
            continue
        for scope, told in (("", held), (" at equal length", cut)):
            if any(both for both, _, _ in told.values()):
                paid = [found.looks[a].label for a, (_, paid, _) in told.items() if paid]
                free = [found.looks[a].label for a, (_, _, free) in told.items() if free]
                yield (
                    f"{beside}{scope} better and less diverse on some split: {', '.join(paid) or 'none'}; better there "
                    f"without a decided loss of diversity: {', '.join(free) or 'none'}{doubt}."
                )


def _paid(found: Found, a: str, b: str, best: Place, varied: Place) -> tuple[int, int, int]:
    """Splits where something is decided of both measures; there, a better and less diverse; better and not less."""
    does, has = (decide(differences(found, a, b, p)) for p in (best, varied))
    both = [s for side in does for s in side if any(s in other for other in has)]
    both = [s for s in both if s != ALL] or both
    paid = [s for s in both if s in does.above and s in has.below]
    free = [s for s in both if s in does.above and s not in has.below]
    return len(both), len(paid), len(free)


def _all_said(found: Found, held: Told, words: Words, equal: Told | None = None) -> Iterator[str]:
    """Sentences on each of a few policies, else one for each measure on all of them.

    `equal` holds the same differences at equal length, where they were measured.
    """
    cut = equal or {}
    for policy, by_place in held.items() if len(held) <= FEW else ():
        yield from _said(found, found.looks[policy].label, by_place, words, cut.get(policy, {}))
    if len(held) > FEW:
        for place in dict.fromkeys(p for by_place in held.values() for p in by_place):
            for whole in (True, False):
                told = {a: _part(by_place.get(place, {}), whole) for a, by_place in held.items()}
                alike = {a: _part(by_place.get(place, {}), whole) for a, by_place in cut.items()}
                yield from _grouped(found, place, {a: part for a, part in told.items() if part}, words, alike)


def _grouped(
    found: Found, place: Place, held: Mapping[str, BySplit], words: Words, equal: Mapping[str, BySplit]
) -> Iterator[str]:
    """One sentence that names together the policies of which the same is to be said, the best ones first."""
    groups: dict[tuple[int, int, str], list[str]] = {}
    for policy, part in held.items():
        verdict, cut = decide(part), decide(equal.get(policy, {}))
        sides = _sides(found, verdict, words, named=False)
        equally = f" ({told})" if (told := _equally(found, verdict, cut, words, named=False)) else ""
        key = (-len(verdict.above), len(verdict.below), sides + equally)
        groups.setdefault(key, []).append(found.looks[policy].label)
    said = [f"{'each of ' * (len(who) > 1)}{_join(who)} {key[-1]}" for key, who in sorted(groups.items())]
    if said:
        scope = "over all prompts " if all(ALL in part for part in held.values()) else ""
        estimates = [e for part in held.values() for e in part.values()]
        open_ = [part[s] for part in held.values() for s in decide(part).undecided]
        end = f"{_many(estimates)}{_advice(found, open_)}{_doubt(found, [place])}"
        yield f"By {_names([place])}, {scope}{'; '.join(said)}{end}."


def _said(
    found: Found,
    subject: str,
    held: Mapping[Place, BySplit],
    words: Words,
    equal: Mapping[Place, BySplit] | None = None,
) -> Iterator[str]:
    """One sentence for all measures that say the same; the split `all` holds the others, so it is not counted in."""
    for whole in (True, False):
        cuts = {place: _part(by_split, whole) for place, by_split in (equal or {}).items()}
        told: dict[tuple[Verdict, float, Verdict], list[Place]] = {}
        for place, by_split in held.items():
            part = _part(by_split, whole)
            if part:
                family = max(e.get("family", 1) for e in part.values())
                told.setdefault((decide(part), family, decide(cuts.get(place, {}))), []).append(place)
        for (verdict, _, cut), places in told.items():
            scope = "over all prompts " if whole else ""
            estimates = _part(held[places[0]], whole).values()
            open_ = [held[place][s] for place in places for s in verdict.undecided]
            sides = _sides(found, verdict, words)
            end = f"{_many(estimates)}{_advice(found, open_)}"
            if equally := _equally(found, verdict, cut, words):
                lone = [e for place in places for e in cuts[place].values()]
                end += f"; {equally}{f' ({estimate(lone[0])})' if len(lone) == 1 else ''}"
            end += _doubt(found, places)
            yield f"By {_names(places)}, {scope}{subject} {sides}{end}."


def _equally(found: Found, verdict: Verdict, cut: Verdict, words: Words, named: bool = True) -> str:
    """The same at equal length, so that nobody takes a difference in length for one in diversity."""
    n = sum(map(len, cut))
    if not n:
        return ""
    if cut == verdict:
        return "the same at equal length"
    if len(cut.undecided) == n:
        return f"at equal length undecided{f' on all {n} splits' if n > 1 else ''}"
    return f"at equal length it {_sides(found, cut, words, named)}"


def _doubt(found: Found, places: Sequence[Place]) -> str:
    """A warning where an LLM judge that contradicts itself decided what the sentence is about."""
    why = doubt(found.results) if any(p in JUDGED for p in places) else ""
    return f" (with care: {why})" if why else ""


def doubt(results: Mapping[str, Any]) -> str:
    """Why win rates of an LLM judge say little, if it contradicts itself too often; else nothing."""
    e = results.get("judge_report", {}).get("consistency")
    if not e or e["mean"] >= CONSISTENT:
        return ""
    return (
        f"the judge named the same winner in both orders on a share of only {e['mean']:.2f} of the pairs, and a coin "
        "would on 0.50"
    )


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
