"""Several workdirs as one: a merged results.json, differences between them paired by prompt, and what they sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import findings, measures, results, samples, sentences, significance
from jaxrlhf.evaluation.figures import label
from jaxrlhf.evaluation.measures import CUT, WIN_RATE, Measured
from jaxrlhf.evaluation.report import PARTS, flat, read_results
from jaxrlhf.evaluation.samples import Record, Samples
from jaxrlhf.files import UserError, read_json, read_records, write_json
from jaxrlhf.logs import progress

Runs = Mapping[str, Mapping[str, Any]]  # name -> results.json
BY_NUMBERS = ("gold", "reward")  # judges whose verdicts are in the samples
RESAMPLES = 2000


def write_comparison(folders: Sequence[str], workdir: Path) -> None:
    """Writes the merged results.json of workdirs that have results, and changes nothing in them.

    Policies are called NAME/POLICY, by the shortest ends of the folders' paths that tell them apart. Each is compared
    with its namesake of the first workdir.

    Raises:
      UserError: a workdir has no results, is given twice, or was measured otherwise than the first (task, splits,
        judge, paper_compat); or `workdir` holds a run's own results.
    """
    paths = _named(folders)
    target = workdir / "results.json"
    if target.exists() and "compared" not in read_json(target):
        raise UserError(f"--workdir={workdir}: holds a run's own results; take another folder for the comparison")
    runs = {name: read_results(Path(folder)).results for name, folder in paths.items()}
    _check_alike(runs, paths)
    base, *others = runs
    read = {name: samples.read(Path(folder), runs[name]) for name, folder in paths.items()}
    jobs = sum(bool(r) for texts, _ in read.values() for splits in texts.values() for r in splits.values())
    with progress("measuring all runs", jobs, delay=2) as bar:
        measured = {name: _measured(texts, runs[name], bar.update) for name, (texts, _) in read.items()}
    remarks = [f"{name}/{line}" for name, (_, gone) in read.items() for line in gone]
    remarks += [f"{name}, {line}" for name, run in runs.items() for line in run["notes"]]
    remarks += [f"{name}, win rates with care: {why}." for name, run in runs.items() if (why := sentences.doubt(run))]
    differences: list[dict[str, Any]] = []
    for other in others:
        dropped = list(_incomparable(read[other][0], read[base][0], runs[base]["judge"]))
        remarks += [f"{other} and {base}: {why}" for _, why in dropped]
        found = list(_across(other, base, measured, [place for places, _ in dropped for place in places]))
        remarks += _unpaired(runs, other, base, found)
        differences += found
    differing = _differing(runs)
    merged: dict[str, Any] = {
        "schema": 1,
        "task": runs[base]["task"],
        "judge": runs[base]["judge"],
        "compared": paths,
        "differing": differing,
        "sweep": _sweep(differing, paths),
        "config": _without(runs[base]["config"], differing),
        "policies": _by_policy(runs, "policies"),
        "generalisation_gap": significance.corrected_gaps(_by_policy(runs, "generalisation_gap")),
        "differences": significance.corrected(differences + _of_pairs(runs, "differences")),
        "comparisons": significance.corrected(_of_pairs(runs, "comparisons"), null=0.5),
    }
    if _cut_otherwise(runs):
        merged |= {key: _uncut(merged[key]) for key in ("policies", "differences")}
        remarks.append(
            "Measures at equal length are left out: the runs cut to other lengths. One cut_words makes them alike."
        )
    write_json(target, merged | {"remarks": list(dict.fromkeys(remarks))})


def _named(folders: Sequence[str]) -> dict[str, str]:
    """Name -> folder."""
    resolved: dict[Path, str] = {}
    for folder in folders:
        if resolved.setdefault(Path(folder).resolve(), folder) is not folder:
            raise UserError(f"--compare={folder}: given twice; name each workdir once")
    if len(resolved) < 2:
        raise UserError(f"--compare={folders[0]}: alone; a comparison takes --compare=WORKDIR twice or more")
    return next(
        names
        for length in count(1)
        if len(names := {"/".join(path.parts[-length:]): f for path, f in resolved.items()}) == len(resolved)
    )


def _check_alike(runs: Runs, paths: Mapping[str, str]) -> None:
    def facts(run: Mapping[str, Any]) -> dict[str, str]:
        config = dict(flat(run["config"]))
        return {
            "task": str(run["task"]),
            "splits": ", ".join(sorted({s for splits in run["policies"].values() for s in splits})),
            "judge": str(run["judge"]),
            "paper_compat": config.get("evaluation.paper_compat", config.get("paper_compat", "False")),
        }

    base, *others = runs
    for other in others:
        for fact, value in facts(runs[other]).items():
            if value != (first := facts(runs[base])[fact]):
                raise UserError(
                    f"--compare={paths[other]}: its {fact} is {value or 'none'}, that of {paths[base]} is "
                    f"{first or 'none'}; only like can be compared"
                )


def _measured(texts: Samples, run: Mapping[str, Any], done: Callable[[], Any]) -> dict[str, dict[str, Measured]]:
    """Policy -> split -> what was measured, prompt by prompt, as far as the samples carry it."""
    config = dict(flat(run["config"]))
    compat = config.get("evaluation.paper_compat", config.get("paper_compat")) == "True"
    by = run["judge"] if run["judge"] in BY_NUMBERS else ""
    found: dict[str, dict[str, Measured]] = {}
    for policy, split, records in ((p, s, r) for p, splits in texts.items() for s, r in splits.items() if r):
        held = measures.in_order(({**r, "id": _key(r)} for r in records), lambda r: r["id"])
        m, _ = results.numbers(held, by)
        m.add_texts([r["responses"] for r in held], compat)
        found.setdefault(policy, {})[split] = m
        done()
    return found


def _key(record: Record) -> tuple[str, str]:
    """What makes two runs' prompts the same: other files may call other prompts by the same id."""
    return str(record["id"]), record["prompt"]


def _incomparable(a: Samples, b: Samples, judge: str) -> Iterator[tuple[list[measures.Place], str]]:
    """Places whose numbers mean something else in one run than in the other, and why."""
    both = [(a[p][s], b[p][s]) for p in a if p in b for s in a[p] if s in b[p]]
    firsts = [(x[0], y[0]) for x, y in both if x and y]
    if any("scores" in x for x, _ in firsts) and not all(_same_scorer(x, y) for x, y in both):
        places: list[measures.Place] = [("score",)] + [WIN_RATE] * (judge == "reward")
        yield places, "their scores come from different reward models, so no difference between them is taken."
    drawn = {(len(x["responses"]), len(y["responses"])) for x, y in firsts}
    if any(n != m for n, m in drawn):
        n, m = next((n, m) for n, m in drawn if n != m)
        yield (
            [("diversity", "per_input")],
            f"{n} and {m} responses a prompt, on which per-input diversity hangs; no difference in it is taken.",
        )


def _same_scorer(a: Sequence[Record], b: Sequence[Record]) -> bool:
    """Whether both runs' reward models gave the references of shared prompts the same scores."""
    scores = {_key(r): r["reference_score"] for r in b if "reference_score" in r}
    shared = [(r["reference_score"], scores[_key(r)]) for r in a if "reference_score" in r and _key(r) in scores]
    return bool(shared) and all(x == y for x, y in shared)


def _across(
    a: str, b: str, measured: Mapping[str, Mapping[str, Mapping[str, Measured]]], dropped: Sequence[measures.Place]
) -> Iterator[dict[str, Any]]:
    """Each policy of run a minus its namesake of run b, paired by prompt."""
    for policy in (p for p in measured[a] if p in measured[b]):
        one, other = ({s: _kept(m, dropped) for s, m in measured[n][policy].items()} for n in (a, b))
        for split in (s for s in one if s in other):
            told = measures.differences([(one[split], other[split])], RESAMPLES)[0]
            if measures.far(split) and all("id" in splits for splits in (one, other)):
                told |= {"gap": g} if (g := measures.gap_differences(one, other, split, RESAMPLES)) else {}
            if told:
                yield {"split": split, "a": f"{a}/{policy}", "b": f"{b}/{policy}"} | told


def _kept(m: Measured, dropped: Sequence[measures.Place]) -> Measured:
    held = {p: v for p, v in m.means.items() if not any(p[: len(d)] == d for d in dropped)}
    return Measured(m.prompts, held, m.sets, m.longer, m.by_length)


def _unpaired(runs: Runs, a: str, b: str, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What both runs measured of a policy and no difference is paired for."""
    policies: dict[str, list[str]] = {}
    for policy in (p for p in runs[a]["policies"] if p in runs[b]["policies"]):
        mine, other = (
            {p for m in runs[n]["policies"][policy].values() for p, _ in findings.walk(m) if _main(p)} for n in (a, b)
        )
        paired = {p for d in found if d["a"] == f"{a}/{policy}" for p, _ in findings.walk(d)}
        if lacking := sorted(mine & other - paired):
            policies.setdefault(", ".join(map(label, lacking)), []).append(policy)
    for names, of in policies.items():
        yield f"{a} and {b}: no paired difference for {names} of {', '.join(of)}; their intervals are unpaired."


def _main(place: measures.Place) -> bool:
    return place[0] not in PARTS and not place[-1].endswith(CUT)


def _differing(runs: Runs) -> dict[str, dict[str, str]]:
    """Config key -> its value in each run, for the keys that are not the same in all."""
    configs = {name: dict(flat(run["config"])) for name, run in runs.items()}
    keys = dict.fromkeys(k for config in configs.values() for k in config if k != "name")
    table = {k: {name: config.get(k, "") for name, config in configs.items()} for k in keys}
    return {k: values for k, values in table.items() if len(set(values.values())) > 1}


def _sweep(differing: Mapping[str, Mapping[str, str]], paths: Mapping[str, str]) -> dict[str, Any]:
    """The one number that the runs differ in, {"key", "values"}; for PPO's, also the KL of its last logged rollout."""
    keys = [k for k in differing if not k.startswith("evaluation.")]
    try:
        values = {name: float(x) for name, x in differing[keys[0]].items()} if len(keys) == 1 else {}
    except ValueError:
        values = {}
    if not values or len(set(values.values())) < len(values) or keys == ["seed"]:
        return {}
    found: dict[str, Any] = {"key": keys[0], "values": values}
    logs = {name: Path(folder) / "ppo" / "metrics.jsonl" for name, folder in paths.items()}
    if keys[0].startswith("ppo.") and all(path.exists() for path in logs.values()):
        kls = {name: [r["ppo/kl"] for r in read_records(path) if "ppo/kl" in r] for name, path in logs.items()}
        found |= {"kl": {name: kl[-1] for name, kl in kls.items()}} if all(kls.values()) else {}
    return found


def _without(config: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        k: _without(v, keys, f"{prefix}{k}.") if isinstance(v, dict) else v
        for k, v in config.items()
        if prefix + k not in keys and (prefix or k != "name")
    }


def _by_policy(runs: Runs, key: str) -> dict[str, Any]:
    return {f"{name}/{policy}": splits for name, run in runs.items() for policy, splits in run[key].items()}


def _of_pairs(runs: Runs, key: str) -> list[dict[str, Any]]:
    return [e | {k: f"{name}/{e[k]}" for k in ("a", "b")} for name, run in runs.items() for e in run[key]]


def _cut_otherwise(runs: Runs) -> bool:
    cuts: dict[str, set[int]] = {}
    for split, m in ((s, m) for run in runs.values() for splits in run["policies"].values() for s, m in splits.items()):
        cuts.setdefault(split, set()).add(m.get("cut", {}).get("words", 0))
    return any(len(words) > 1 for words in cuts.values())


def _uncut(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_uncut(e) for e in tree]
    if isinstance(tree, dict):
        return {k: _uncut(v) for k, v in tree.items() if k != "cut" and not k.endswith(CUT)}
    return tree
