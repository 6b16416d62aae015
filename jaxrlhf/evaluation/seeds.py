"""One experiment run with several seeds: every number of results.json as a mean over the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import significance
from jaxrlhf.evaluation.measures import CUT, Place, Tree, limits, put, walk
from jaxrlhf.evaluation.statistics import ANY, over_seeds
from jaxrlhf.files import UserError, read_json, write_json

Results = Mapping[str, Any]
# How many names stand before what was measured: policy and split, or two policies and a split.
SECTIONS = {"policies": 2, "generalisation_gap": 2, "differences": 3, "comparisons": 3}


def write_combined(runs: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Combines the results.json of the workdirs `runs` into that of `workdir`.

    Raises:
      UserError: a run has no results, they do not fit together, or `workdir` holds a run of its own.
    """
    target = workdir / "results.json"
    held = [Path(run) / "results.json" for run in runs]
    if (workdir / "config.json").exists() or (target.exists() and "seeds" not in read_json(target)):
        raise UserError(
            f"--workdir={workdir} holds a run of its own; name another folder for what --seeds say together"
        )
    if target.resolve() in [path.resolve() for path in held]:
        raise UserError(f"--workdir={workdir} is one of --seeds; name another folder for what they say together")
    found = combine([_read(path) for path in held])
    write_json(target, found)
    return found


def combine(runs: Sequence[Results]) -> dict[str, Any]:
    """What runs that differ in `config.seed` alone say together: a tree as that of results.json, over seeds.

    Every estimate is `over_seeds` of the runs' means, n the number of seeds. Differences and gaps are each run's own,
    and so paired within a seed; they are judged anew, with Holm's correction. What some runs lack, and metrics of texts
    that were cut to other lengths, stand in "missing" ({"at", "why", "seeds"}) and nowhere else. What belongs to one
    run is left out: thirds by length, and how a judge fared.

    Raises:
      UserError: fewer than two runs, a seed twice, or a key in which they differ, named.
    """
    seeds = [_seed(run, i) for i, run in enumerate(runs, 1)]
    if len(runs) < 2:
        raise UserError("--seeds: one run has no interval over seeds; give the flag twice or more")
    for seed, run in zip(seeds, runs, strict=True):
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds: {seeds.count(seed)} runs have config.seed={seed}; each seed counts once")
        _check_alike(runs[0], run, seed)
    tree, missing = _over(dict(zip(seeds, map(_indexed, runs), strict=True)))
    for policy, splits in tree["policies"].items():
        for split, m in splits.items():
            splits[split] = _counts([run["policies"][policy][split] for run in runs]) | m
    lists = {
        section: [
            {"split": split, "a": a, "b": b} | told
            for a, others in tree[section].items()
            for b, splits in others.items()
            for split, told in splits.items()
        ]
        for section in ("differences", "comparisons")
    }
    sampling = {
        p: i for p, i in runs[0].get("sampling", {}).items() if all(i == r.get("sampling", {}).get(p) for r in runs)
    }
    return {
        **{key: runs[0][key] for key in ("schema", "task", "judge") if key in runs[0]},
        "seeds": seeds,
        "missing": missing,
        "config": {k: v for k, v in runs[0]["config"].items() if k != "seed"},
        "sampling": sampling,
        "policies": tree["policies"],
        "generalisation_gap": significance.corrected_gaps(tree["generalisation_gap"]),
        "differences": significance.corrected(lists["differences"]),
        "comparisons": significance.corrected(lists["comparisons"], null=0.5),
    }


def _read(path: Path) -> Results:
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("policies"), dict):
        raise UserError(f"{path}: no policies in it; `jaxrlhf evaluate` writes it anew")
    return found


def _seed(run: Results, i: int) -> int:
    config = run.get("config")
    if not isinstance(config, Mapping) or "seed" not in config:
        raise UserError(f"--seeds, run {i}: its results.json has no config.seed; only a recipe's runs have seeds")
    return config["seed"]


def _check_alike(first: Results, run: Results, seed: int) -> None:
    one, other = (
        {k: r.get(k) for k in ("schema", "task", "judge")} | dict(_flat(r["config"], "config.")) for r in (first, run)
    )
    for key in one | other:
        if key != "config.seed" and one.get(key) != other.get(key):
            raise UserError(
                f"--seeds: {key} is {one.get(key)!r} in the first run and {other.get(key)!r} in that of seed {seed}; "
                "the runs must differ in config.seed alone"
            )


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _indexed(run: Results) -> Tree:
    """The sections that hold estimates, lists as trees: section -> a -> b -> split."""
    found: Tree = {section: run.get(section, {}) for section in ("policies", "generalisation_gap")}
    for section in ("differences", "comparisons"):
        found[section] = {}
        for d in run.get(section, []):
            found[section].setdefault(d["a"], {}).setdefault(d["b"], {})[d["split"]] = d
    return found


def _over(runs: Mapping[int, Tree]) -> tuple[Tree, list[dict[str, Any]]]:
    """The mean over seeds of what all runs have, and what is missing."""
    held = {seed: dict(walk(tree)) for seed, tree in runs.items()}
    tops = {seed: {_top(place) for place in found} for seed, found in held.items()}
    over: Tree = {section: {} for section in SECTIONS}
    missing: dict[str, dict[str, Any]] = {}
    for place in dict.fromkeys(p for found in held.values() for p in found):
        top, split = _top(place), place[SECTIONS[place[0]]]
        lacking = [seed for seed in runs if place not in held[seed]]
        words = {m["cut"]["words"] for tree in runs.values() for m in _of_split(tree, split)}
        if lacking:
            gone = top if not any(top in tops[seed] for seed in lacking) else place
            at = "/".join(gone)
            missing[at] = {"at": at, "why": "not measured", "seeds": lacking}
        elif place[-1].endswith(CUT) and len(words) > 1:
            why = f"texts were cut to {', '.join(map(str, sorted(words)))} words; set config.evaluation.cut_words"
            missing[f"{split}{CUT}"] = {"at": f"at equal length, {split}", "why": why, "seeds": list(runs)}
        else:
            measured = place[len(top) :]
            bounded = place[0] in ("policies", "comparisons")
            e = over_seeds([held[seed][place]["mean"] for seed in runs], limits(measured) if bounded else ANY)
            if not all("se" in held[seed][place] for seed in runs):
                del e["se"]
            put(over, place, e)
    return over, list(missing.values())


def _top(place: Place) -> Place:
    return place[: SECTIONS[place[0]] + 1]


def _of_split(tree: Tree, split: str) -> list[Any]:
    return [splits[split] for splits in tree["policies"].values() if "cut" in splits.get(split, {})]


def _counts(held: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many prompts and samples each run had, and how texts were cut, where all are alike."""
    alike = {
        k: held[0][k] for k in ("n_prompts", "samples_per_prompt") if all(m.get(k) == held[0].get(k) for m in held)
    }
    cuts = [m["cut"] for m in held if "cut" in m]
    if len({c["words"] for c in cuts}) == 1:
        alike["cut"] = {"words": cuts[0]["words"], "reached": min(c["reached"] for c in cuts)}
    return alike
