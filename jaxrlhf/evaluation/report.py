"""The report: one self-contained page of a workdir, with no script and no remote asset."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jaxrlhf.evaluation import figures
from jaxrlhf.evaluation.figures import Estimate, Look, Series
from jaxrlhf.files import UserError, read_json, read_records, write_text

STAGES = {"pretrain": "Pretraining", "sft": "SFT", "reward": "Reward model", "ppo": "PPO"}
SHOWN_PROMPTS, SHOWN_RESPONSES, SHOWN_LETTERS = 3, 2, 20_000
PERFORMANCE = (("win_rate",), ("gold",), ("score",))  # the first that is there speaks for generalisation
ALL = "all"  # the split that holds the others


class Found(NamedTuple):
    """What results.json holds, and what its policies and splits are called on the page."""

    results: Mapping[str, Any]
    looks: dict[str, Look]
    splits: dict[str, str]  # split -> label, in the order of the page
    paths: list[figures.Path]  # what was measured


class Verdict(NamedTuple):
    """Splits on which one estimate's interval lies above the other's, below it, or neither."""

    above: tuple[str, ...]
    below: tuple[str, ...]
    undecided: tuple[str, ...]


def write_report(workdir: Path) -> Path:
    """Draws `report/index.html` and `report/figures/*.png` from what the workdir holds; returns the page's path.

    Only results.json is needed; the page says what else is missing.

    Raises:
      UserError: there are no results to show, or a file of the workdir does not parse.
    """
    found = read_results(workdir)
    results = found.results
    config = results["config"] or (read_json(p) if (p := workdir / "config.json").exists() else {})
    summaries = {s: read_json(p) for s in (*STAGES, "samples") if (p := workdir / s / "summary.json").exists()}
    metrics = {s: read_records(p, ("step",)) for s in STAGES if (p := workdir / s / "metrics.jsonl").exists()}
    accuracy = _accuracy(summaries.get("reward", {}))
    samples = list(_samples(workdir, found))
    curves = {s: list(figures.curves(s, rows)) for s, rows in metrics.items()}
    pictures = _pictures(found, accuracy) | {n: png for drawn in curves.values() for n, _, png in drawn}
    _write_pictures(workdir / "report" / "figures", pictures)
    page = _template().render(
        found=found,
        title=config.get("name", "outputs"),
        facts=list(_facts(results, config)),
        config=list(_flat(config)),
        truncated=[(s, k, n) for s, found in summaries.items() for k, n in found.get("truncated", {}).items()],
        findings=findings(found),
        best=_best(found),
        varied=_varied(found),
        pictures={n: base64.b64encode(png).decode() for n, png in pictures.items()},
        curves={STAGES[s]: [(n, label) for n, label, _ in drawn] for s, drawn in curves.items() if drawn},
        accuracy=accuracy,
        samples=samples,
        decided=list(_decided(found)),
        pairs=_pairs(found),
        counts=list(_counts(found)),
        rows=list(_rows(found)),
        absent=list(_absent(found, config, metrics, accuracy, samples)),
    )
    write_text(workdir / "report" / "index.html", page)
    return workdir / "report" / "index.html"


def read_results(workdir: Path) -> Found:
    """The workdir's results.json, with what it may lack filled in as empty; `UserError` if it is not one."""
    path = workdir / "results.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run `jaxrlhf evaluate --workdir={workdir} …` first")
    read = read_json(path)
    policies = read.get("policies") if isinstance(read, dict) else None
    if not isinstance(policies, dict) or not policies or not all(isinstance(s, dict) for s in policies.values()):
        raise UserError(f"{path}: no policies in it; `jaxrlhf evaluate` writes it anew")
    empty = {"config": {}, "sampling": {}, "generalisation_gap": {}, "comparisons": []}
    results = empty | read
    n = results["sampling"].get("bon", {}).get("best_of", "N")
    known = {"sft": "SFT", "bon": f"best-of-{n}", "ppo": "PPO"}
    held = dict.fromkeys(s for splits in policies.values() for s in splits)
    ordered = [s for s in ("id", ALL) if s in held] + [s for s in held if s not in ("id", ALL)]
    return Found(
        results=results,
        looks=figures.looks({p: known.get(p, figures.visible(p)) for p in policies}),
        splits={s: "in-distribution" if s == "id" else figures.visible(s.removeprefix("ood_")) for s in ordered},
        paths=list(
            dict.fromkeys(path for splits in policies.values() for m in splits.values() for path, _ in _walk(m))
        ),
    )


def compare(a: Mapping[str, Estimate], b: Mapping[str, Estimate]) -> Verdict:
    """Where a's interval lies wholly above b's, wholly below it, or overlaps with it, over the splits of both."""
    shared = [s for s in a if s in b]
    above = tuple(s for s in shared if a[s]["low"] > b[s]["high"])
    below = tuple(s for s in shared if a[s]["high"] < b[s]["low"])
    return Verdict(above, below, tuple(s for s in shared if s not in above + below))


def findings(found: Found) -> dict[str, list[str]]:
    """What the numbers say, in sentences, and no more than their intervals support."""
    best, varied = _best(found), _varied(found)
    performance = [p for p in PERFORMANCE[:2] if p in found.paths] or ([best] if best else [])
    diversity = [p for p in found.paths if varied and p[:2] == varied[:2]]
    other = [p for p in found.paths if p[0] == "diversity" and p not in diversity]
    better, diverse = ("does better than", "does worse than"), ("is more diverse than", "is less diverse than")
    return {
        "generalisation": [*_numbers(found, best), *_said_of_pairs(found, performance, *better)],
        "distance": [*_said_of_gaps(found, performance)],
        "diversity": [*_numbers(found, varied), *_said_of_pairs(found, diversity, *diverse)],
        "heads": list(_heads(found)),
        "length": list(_said_of_pairs(found, [("length",)], "writes more than", "writes less than")),
        "gap": list(_said_of_gaps_alone(found, performance)),
        "across": list(_said_of_pairs(found, other, *diverse)),
        "tradeoff": list(_bargains(found, best, varied)),
    }


def _best(found: Found) -> figures.Path | None:
    return next((p for p in PERFORMANCE if p in found.paths), None)


def _varied(found: Found) -> figures.Path | None:
    """The metric that speaks for diversity: per input where prompts have several responses, EAD where it is there."""
    held = [p for p in found.paths if p[0] == "diversity"]
    return min(held, key=lambda p: (p[1] != "per_input", p[2] != "ead"), default=None)


def _series(found: Found, path: figures.Path) -> dict[str, dict[str, Estimate]]:
    series = {
        policy: {s: e for s in found.splits if s in splits for p, e in _walk(splits[s]) if p == path}
        for policy, splits in found.results["policies"].items()
    }
    return {policy: splits for policy, splits in series.items() if splits}


def _gaps(found: Found, path: figures.Path) -> dict[str, dict[str, Estimate]]:
    gaps = found.results["generalisation_gap"]
    series = {p: {s: m[path[0]] for s, m in gaps[p].items() if path[0] in m} for p in found.looks if p in gaps}
    return {policy: splits for policy, splits in series.items() if splits}


def _walk(tree: Any, path: figures.Path = ()) -> Iterator[tuple[figures.Path, Estimate]]:
    """Every estimate in a tree of objects, with where it lies."""
    if isinstance(tree, dict):
        if {"mean", "low", "high", "n"} <= tree.keys():
            yield path, tree
        else:
            for key, value in tree.items():
                yield from _walk(value, (*path, key))


def _pairs(found: Found) -> list[tuple[str, str]]:
    """Each policy beside SFT, or beside the first one; and PPO beside best-of-N."""
    base = "sft" if "sft" in found.looks else next(iter(found.looks))
    return [(p, base) for p in found.looks if p != base] + [("ppo", "bon")] * ({"ppo", "bon"} <= found.looks.keys())


def _numbers(found: Found, path: figures.Path | None) -> Iterator[str]:
    series = _series(found, path) if path else {}
    split = next((s for s in found.splits if any(s in e for e in series.values())), None)
    if path and split is not None:
        told = [f"{found.looks[p].label} {estimate(e[split])}" for p, e in series.items() if split in e]
        where = {"id": "In distribution", ALL: "Over all prompts"}.get(split, f"On {found.splits[split]}")
        yield f"{where}, {figures.label(path)}: {', '.join(told)}."


def _said_of_pairs(found: Found, paths: Sequence[figures.Path], more: str, less: str) -> Iterator[str]:
    for a, b in _pairs(found):
        verdicts = {p: compare(_series(found, p).get(a, {}), _series(found, p).get(b, {})) for p in paths}
        one, other = found.looks[a].label, found.looks[b].label
        yield from _said(found, verdicts, one, f"{more} {other}", f"{less} {other}", f"is not told apart from {other}")


def _said_of_gaps(found: Found, paths: Sequence[figures.Path]) -> Iterator[str]:
    for a, b in _pairs(found):
        verdicts = {p: compare(_gaps(found, p).get(a, {}), _gaps(found, p).get(b, {})) for p in paths}
        one, other = found.looks[a].label, found.looks[b].label
        same = f"is not shown to lose more or less than {other} from in-distribution"
        yield from _said(found, verdicts, one, f"loses more than {other}", f"loses less than {other}", same, "gap in ")


def _said_of_gaps_alone(found: Found, paths: Sequence[figures.Path]) -> Iterator[str]:
    zero = {s: {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 0} for s in found.splits}
    for policy, look in found.looks.items():
        verdicts = {p: compare(_gaps(found, p).get(policy, {}), zero) for p in paths}
        same = "is not told apart from in distribution"
        yield from _said(
            found, verdicts, look.label, "does worse than in distribution", "does better than in distribution", same
        )


def _said(
    found: Found, verdicts: Mapping[figures.Path, Verdict], subject: str, more: str, less: str, same: str, of: str = ""
) -> Iterator[str]:
    """One sentence for all measures that say the same; the split `all` holds the others, and so speaks for itself."""
    for whole in (True, False):
        told: dict[Verdict, list[figures.Path]] = {}
        for path, verdict in verdicts.items():
            part = Verdict(*(tuple(s for s in side if (s == ALL) == whole) for side in verdict))
            if any(part):
                told.setdefault(part, []).append(path)
        for verdict, paths in told.items():
            n = sum(map(len, verdict))
            sides = [f"{v}{_on(found, s, n)}" for v, s in ((more, verdict.above), (less, verdict.below)) if s]
            if verdict.undecided:
                where = (
                    "" if whole else f" on any of {n} splits" if n > 1 else f" on {found.splits[verdict.undecided[0]]}"
                )
                sides += [f"{len(verdict.undecided)} undecided"] if sides else [f"{same}{where} (undecided)"]
            yield f"By {of}{_names(paths)}, {'over all prompts ' * whole}{subject} {'; '.join(sides)}."


def _on(found: Found, splits: Sequence[str], n: int) -> str:
    if splits == (ALL,):
        return ""
    named = f" ({', '.join(found.splits[s] for s in splits)})" if len(splits) < n else ""
    return f" on {len(splits)} of {n} split{'s' * (n > 1)}{named}"


def _names(paths: Sequence[figures.Path]) -> str:
    scopes = dict.fromkeys(p[1] for p in paths if p[0] == "diversity")
    if len(scopes) == 1:
        scope = next(iter(scopes))
        return f"{figures.SCOPES.get(scope, scope)} {_join([figures.METRICS.get(p[2], p[2]) for p in paths])}"
    return _join([figures.label(p) for p in paths])


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _headed(found: Found) -> dict[tuple[str, str], dict[str, Estimate]]:
    headed: dict[tuple[str, str], dict[str, Estimate]] = {}
    for c in found.results["comparisons"]:
        headed.setdefault((c["a"], c["b"]), {})[c["split"]] = c["win_rate"]
    return headed


def _heads(found: Found) -> Iterator[str]:
    for (a, b), held in _headed(found).items():
        even = {s: {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 0} for s in held}
        one, other = _label(found, a), _label(found, b)
        same = f"and {other} are not told apart"
        yield from _said(
            found, {("head-to-head win rate",): compare(held, even)}, one, f"beats {other}", f"loses to {other}", same
        )


def _bargains(found: Found, best: figures.Path | None, varied: figures.Path | None) -> Iterator[str]:
    if not (best and varied):
        return
    for a, b in _pairs(found):
        does, has = (compare(_series(found, p).get(a, {}), _series(found, p).get(b, {})) for p in (best, varied))
        n = len([s for side in does for s in side if s in sum(has, ())])
        if n:
            paid = [s for s in does.above if s in has.below]
            free = [s for s in does.above if s not in has.below and s in sum(has, ())]
            one, other = found.looks[a].label, found.looks[b].label
            yield (
                f"{one} is better and less diverse than {other} on {len(paid)} of {n} splits, "
                f"and better without a decided loss of diversity on {len(free)}."
            )


def _label(found: Found, policy: str) -> str:
    return found.looks[policy].label if policy in found.looks else figures.visible(policy)
