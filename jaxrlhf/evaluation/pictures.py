"""Which figures the report has: every one that the numbers allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from jaxrlhf.evaluation import figures, findings, tradeoff
from jaxrlhf.evaluation.figures import Estimate
from jaxrlhf.evaluation.findings import Found
from jaxrlhf.evaluation.measures import ALL, CUT, Place
from jaxrlhf.logs import progress


def write(folder: Path, drawn: Mapping[str, bytes]) -> None:
    """Each picture as `folder`/NAME.png; other pictures there go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.stem not in drawn:
            old.unlink()
    for name, png in drawn.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(png)
        partial.replace(folder / f"{name}.png")


def draw(found: Found, accuracy: Mapping[str, Mapping[str, Estimate]]) -> dict[str, bytes]:
    """Every figure that the numbers allow; a name tells the template where it goes."""
    looks, splits = found.looks, found.splits
    best, varied = findings.performance(found), findings.variety(found)
    titles = [("Generalisation", best), ("Diversity", varied)]
    panels = [(title, findings.series(found, place), place) for title, place in titles if place]
    pictures: dict[str, Callable[[], bytes]] = {}
    if panels:
        pictures["headline"] = partial(figures.headline, panels, looks, splits, wide=True)
        pictures["headline_narrow"] = partial(figures.headline, panels, looks, splits, wide=False)
    for i, place in enumerate(found.places):
        pictures[_named(place, i)] = partial(figures.by_split, findings.series(found, place), looks, splits, place)
    far = {s: t for s, t in splits.items() if s not in ("id", ALL)}
    for place in findings.PERFORMANCE:
        if gaps := findings.gaps(found, place):
            pictures[f"gap_{place[0]}"] = partial(figures.by_split, gaps, looks, far, place, zero="gap in ")
    if heads := findings.heads(found):
        named = {f"{looks[a].label} against {looks[b].label}": held for (a, b), held in heads.items()}
        pictures["heads"] = partial(figures.shares, named, splits, "share of comparisons won by the first", "even")
    if best and varied:
        x, y = findings.series(found, varied), findings.series(found, best)
        points = {p: {s: (x[p][s], y[p][s]) for s in y[p] if s in x[p]} for p in y if p in x}
        pictures["tradeoff"] = partial(
            figures.tradeoff, points, looks, splits, figures.label(varied), figures.label(best)
        )
    pictures |= dict(_sweeps(found, [p for p in (best, varied) if p]))
    pictures |= dict(_tradeoffs(found, [p for p in (best, varied) if p]))
    if accuracy:
        rows = {s: findings.split_label(s) for held in accuracy.values() for s in held}
        pictures["accuracy"] = partial(
            figures.shares, accuracy, rows, "share of pairs ranked as the judge does", "chance"
        )
    drawn: dict[str, bytes] = {}
    with progress("drawing", len(pictures), delay=2) as bar:
        for name, drawing in pictures.items():
            drawn[name] = drawing()
            bar.update()
    return drawn


def _named(place: findings.Place, i: int) -> str:
    """A picture's name, never made from what a file calls a measure."""
    if place in figures.LABELS:
        return f"measure_{place[0]}"
    if len(place) == 3 and place[0] == "diversity" and place[1] in figures.SCOPES and place[2] in figures.METRICS:
        return f"{'cut_' if place[2].endswith(CUT) else ''}{place[1]}_{place[2]}"
    return f"other_{i}"


def _sweeps(found: Found, places: Sequence[Place]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Of each split and measure a panel over the key that was swept, and one of PPO over its KL to SFT."""
    sweep = found.results["sweep"]
    for axis, x_label in (("values", str(sweep.get("key"))), ("kl", "KL to SFT at the end (nats a response)")):
        for i, split in enumerate(found.splits):
            for place in places:
                lines = findings.swept(found, axis, place, split)
                if lines:
                    looks = figures.looks({policy: policy for policy in lines})
                    drawing = partial(figures.sweep, lines, looks, found.splits[split], x_label, figures.label(place))
                    yield f"sweep_{axis}_{i}_{place[0]}", drawing


def _tradeoffs(found: Found, places: Sequence[Place]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Of each split and measure a panel over the KL to SFT, and one over the values where a number was swept."""
    points = found.results["tradeoff"].get("points", [])
    axes = found.results["tradeoff"].get("axes", {})
    bounds = list(dict.fromkeys(p["kl_bound"] for p in points if "kl_bound" in p))
    for i, split in enumerate(found.splits):
        for place in places:
            lines = {p: tradeoff.over_kl(points, p, split, place) for p in found.looks}
            if any(len(held) > 1 for held in lines.values()):
                kept = {p: held for p, held in lines.items() if held}
                y_label = figures.label(place)
                yield (
                    f"curve_kl_{i}_{place[0]}",
                    partial(figures.against_kl, kept, found.looks, bounds, found.splits[split], y_label),
                )
            for j, key in enumerate(axes):
                over = {p: tradeoff.over_axis(points, p, split, place, key) for p in found.looks}
                over = {p: held for p, held in over.items() if len(held) > 1}
                if len(axes) == 1 and over:
                    yield (
                        f"curve_axis_{i}_{place[0]}_{j}",
                        partial(figures.sweep, over, found.looks, found.splits[split], key, figures.label(place)),
                    )
