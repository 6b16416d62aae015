"""`results.json`: every number that the report shows, from a recipe's samples or from anybody's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxrlhf.evaluation import diversity, generalisation, outputs
from jaxrlhf.evaluation.statistics import Estimate, jackknife, mean_estimate, win_rate
from jaxrlhf.files import UserError, read_json, read_records, write_json

if TYPE_CHECKING:
    from jaxrlhf.config import Experiment

Log = Callable[[str], None]
POLICIES = ("sft", "bon", "ppo")


def evaluate_outputs(
    outputs: Sequence[str],
    reference: str,
    annotations: Sequence[str],
    paper_compat: bool,
    workdir: Path,
    log: Log,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Measures outputs from files, `name=path` each, and writes `results.json`; see `outputs.py` for the formats."""
    answers, verdicts = _read(outputs, reference, annotations, log)
    policies: dict[str, dict[str, Any]] = {}
    for name, found in answers.items():
        policies[name] = {}
        for split in _splits(found.dataset.values()):
            keys = [k for k, d in found.dataset.items() if split in ("all", d)]
            texts = [found.responses[k] for k in keys]
            measured: dict[str, Any] = {"n_prompts": len(texts), "samples_per_prompt": len(texts[0])}
            judged = [o for d, o in verdicts.get(name, ()) if split in ("all", d)]
            if judged:
                measured["win_rate"] = win_rate(np.array(judged), resamples)
            measured["length"] = mean_estimate(_lengths(texts), resamples)
            measured["diversity"] = measure_diversity(texts, paper_compat, resamples, f"{name}, {split}")
            policies[name][split] = measured
    found = {
        "schema": 1,
        "task": "outputs",
        "judge": "annotations",
        "config": {
            "outputs": list(outputs),
            "reference": reference,
            "annotations": list(annotations),
            "paper_compat": paper_compat,
        },
        "policies": policies,
        "generalisation_gap": {},
        "comparisons": [],
    }
    if not annotations:
        del found["judge"]
    write_json(workdir / "results.json", found)
    return found


def evaluate_samples(workdir: Path, config: Experiment, log: Log) -> dict[str, Any]:
    """Measures `samples/<policy>/<split>.jsonl` of a recipe's workdir and writes `results.json`."""
    judge = config.evaluation.judge
    key = {"gold": "gold", "reward": "score"}[judge]
    resamples = config.evaluation.bootstrap
    numbers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    judged: dict[str, dict[str, np.ndarray]] = {}
    policies: dict[str, dict[str, Any]] = {}
    for policy, splits in _read_samples(workdir).items():
        numbers[policy], judged[policy], policies[policy] = {}, {}, {}
        for split, records in splits.items():
            values, judged[policy][split] = _numbers(records, key)
            numbers[policy][split] = values
            texts = [r["responses"] for r in records]
            measured: dict[str, Any] = {"n_prompts": len(texts), "samples_per_prompt": len(texts[0])}
            measured |= generalisation.estimates(values, resamples)
            title = f"{policy}, {split}"
            measured["diversity"] = measure_diversity(texts, config.evaluation.paper_compat, resamples, title)
            policies[policy][split] = measured
    found = {
        "schema": 1,
        "task": config.task,
        "judge": judge,
        "config": read_json(workdir / "config.json"),
        "sampling": {p: read_json(i) for p in policies if (i := workdir / "samples" / p / "info.json").exists()},
        "policies": policies,
        "generalisation_gap": generalisation.gaps(numbers, resamples),
        "comparisons": generalisation.comparisons(judged, resamples),
    }
    write_json(workdir / "results.json", found)
    return found


def measure_diversity(
    texts: Sequence[Sequence[str]], paper_compat: bool, resamples: int, title: str
) -> dict[str, dict[str, Estimate]]:
    """Per-input (where prompts have several responses) and across-input diversity by every metric."""
    bar = tqdm(texts, desc=f"diversity of {title}", leave=False, delay=2)
    grams = [[diversity.ngrams(t, paper_compat) for t in responses] for responses in bar]
    found: dict[str, dict[str, Estimate]] = {}
    if len(texts[0]) > 1:
        found["per_input"] = {k: mean_estimate(v, resamples) for k, v in diversity.per_input(grams).items()}
    found["across_input"] = {k: jackknife(*v) for k, v in diversity.across_input(grams).items()}
    return found


def table(results: Mapping[str, Any]) -> str:
    """The main numbers as aligned text, a row for each policy and split."""
    head = ["policy", "split", "n", "win rate", "gold", "score", "words", "per-input EAD", "across-input EAD"]
    rows = [head]
    for policy, splits in results["policies"].items():
        for split, m in splits.items():
            scopes = m["diversity"]
            cells = [m.get(k) for k in ("win_rate", "gold", "score", "length")]
            cells += [scopes.get(s, {}).get("ead") for s in ("per_input", "across_input")]
            rows.append([policy, split, str(m["n_prompts"]), *map(_cell, cells)])
    kept = [c for c in range(len(head)) if any(row[c] for row in rows[1:])]
    widths = [max(len(row[c]) for row in rows) for c in kept]
    return "\n".join("  ".join(row[c].ljust(w) for c, w in zip(kept, widths, strict=True)).rstrip() for row in rows)


def _cell(e: Estimate | None) -> str:
    return f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" if e else ""


def _read(
    entries: Sequence[str], reference: str, annotations: Sequence[str], log: Log
) -> tuple[dict[str, outputs.Answers], dict[str, list[tuple[str, float]]]]:
    answers = {n: outputs.read_answers(p, n, log) for n, p in outputs.read_named(entries, "outputs").items()}
    verdicts = {n: outputs.read_verdicts(p) for n, p in outputs.read_named(annotations, "annotations").items()}
    for name in verdicts:
        if name not in answers:
            raise UserError(f"--annotations {name}=…: no --outputs has that name; known are {', '.join(answers)}")
    if reference:
        if "reference" in answers:
            raise UserError("--outputs reference=…: that name is kept for --reference")
        answers["reference"] = outputs.read_answers([Path(reference)], "reference", log)
    return answers, verdicts


def _splits(datasets: Iterable[str]) -> list[str]:
    return ["all", *sorted({d for d in datasets if d and d != "all"})]


def _lengths(texts: Sequence[Sequence[str]]) -> np.ndarray:
    return np.array([np.mean([len(t.split()) for t in responses]) for responses in texts])


def _read_samples(workdir: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found = {}
    for policy in POLICIES:
        paths = {p.stem: p for p in (workdir / "samples" / policy).glob("*.jsonl")}
        order = [s for s in ("id",) if s in paths] + sorted(s for s in paths if s != "id")
        if paths:
            found[policy] = {s: read_records(paths[s], ("id", "prompt", "responses", "scores")) for s in order}
    if not found:
        raise UserError(f"{workdir}/samples holds no samples; run `jaxrlhf sample` first")
    return found


def _numbers(records: Sequence[Mapping[str, Any]], key: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each prompt's numbers, and the judge's value of each of its responses [B, N]."""
    columns = {"score": "scores", "gold": "gold"}
    if any(columns[key] not in r for r in records):
        raise UserError(f"config.evaluation.judge: samples have no field {columns[key]!r} to judge by")
    judged_BN = np.array([r[columns[key]] for r in records], np.float64)
    values = {}
    # A prompt without a reference response has none to win against.
    against = [b for b, r in enumerate(records) if f"reference_{key}" in r]
    if against:
        reference_B1 = np.array([[records[b][f"reference_{key}"]] for b in against], np.float64)
        values["win_rate"] = generalisation.outcomes(judged_BN[against], reference_B1)
    for name, column in columns.items():
        if all(column in r for r in records):
            values[name] = np.array([np.mean(r[column]) for r in records])
    values["length"] = _lengths([r["responses"] for r in records])
    return values, judged_BN
