"""`results.json`: every number that the report shows, from a recipe's samples or from anybody's outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.evaluation import contests, generalisation, judge, measures, significance, variety
from jaxrlhf.evaluation import outputs as given
from jaxrlhf.evaluation.contests import Log, Policies
from jaxrlhf.evaluation.judge import REWARD, Judge
from jaxrlhf.evaluation.measures import ALL, KL, PROXY, WIN_RATE, Measured, against_each_other, far, in_order
from jaxrlhf.evaluation.outputs import Answers, Verdict
from jaxrlhf.evaluation.samples import read_sampled
from jaxrlhf.evaluation.statistics import Estimate
from jaxrlhf.files import UserError, read_json, write_json

if TYPE_CHECKING:
    from jaxrlhf.config import Experiment


def evaluate_outputs(
    outputs: Sequence[str],
    reference: str,
    annotations: Sequence[str],
    paper_compat: bool,
    workdir: Path,
    log: Log,
    resamples: int = 2000,
    cut_words: int = 0,
    sentence_encoder: str = "",
    nli_model: str = "",
    judged_by: Judge | None = None,
) -> dict[str, Any]:
    """Measures outputs from files, `name=path` each, and writes `results.json`; see `outputs.py` for the formats.

    Win rates come from annotations or from a judge that reads texts, `judged_by`, which also compares head to head.
    """
    if judged_by:
        judge.check(judged_by)
        if annotations:
            raise UserError("--judge and --annotations both say who wins; give one of them")
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        log(line)

    answers = _read(outputs, reference, note)
    verdicts = _verdicts(annotations, answers, note)
    _tell_lacking(answers, note)
    scores = contests.score_outputs(answers, judged_by) if judged_by and judged_by.name.startswith(REWARD) else {}
    compared, told = contests.judge_outputs(answers, judged_by, scores, workdir, log) if judged_by else ([], {})
    outcomes = {name: given.outcomes(held) for name, held in verdicts.items()}
    longer = {name: given.longer(held) for name, held in verdicts.items()}
    for match, won in compared:
        if match.b == "reference":
            outcomes[match.a], longer[match.a] = won, match.longer
    by_length = bool(judged_by) and judge.by_length(judged_by.name)
    measured: Policies = {name: {} for name in answers}
    texts: dict[str, dict[str, list[list[str]]]] = {name: {} for name in answers}
    samples = {name: len(next(iter(found.responses.values()))) for name, found in answers.items()}
    splits = _splits({name: found.dataset for name, found in answers.items()})
    for name, split in [(n, s) for n in answers for s in splits[n]]:
        found = answers[name]
        keys = [k for k, d in found.dataset.items() if split in (ALL, d)]
        m = measured[name][split] = Measured(keys, by_length=by_length)
        of_prompts = _ordered(outcomes.get(name, {}))
        if won := {k: o for k, o in of_prompts.items() if split == ALL or found.dataset.get(k) == split}:
            m.add_mean(WIN_RATE, list(won), list(won.values()))
            held = answers["reference"].responses if "reference" in answers else {}
            known = {k: judge.longer(found.responses[k], held[k]) for k in keys if k in held}
            m.longer = known | longer.get(name, {})
        if scores:
            m.add_mean(PROXY, keys, [float(scores[name][k].mean()) for k in keys])
        texts[name][split] = [found.responses[k] for k in keys]
    cuts = variety.add(measured, texts, variety.Options(paper_compat, cut_words, sentence_encoder, nli_model))
    jobs = [
        (match, s, part)
        for match, won in compared
        if match.b != "reference"
        for s in splits[match.a]
        if (part := {k: o for k, o in won.items() if s in (ALL, answers[match.a].dataset[k])})
    ]
    found = {
        "schema": 1,
        "task": "outputs",
        "judge": judged_by.name if judged_by else "annotations",
        **told,
        "config": {
            "outputs": list(outputs),
            "reference": reference,
            "annotations": list(annotations),
            "paper_compat": paper_compat,
            "cut_words": cut_words,
            "sentence_encoder": sentence_encoder,
            "nli_model": nli_model,
            **({"judge": judge.settings(judged_by)} if judged_by else {}),
        },
        **_estimates(measured, samples, cuts, resamples),
        "diversity_by_length": variety.by_length(measured, resamples, texts, paper_compat),
        "comparisons": significance.corrected(contests.heads(jobs, resamples, by_length), null=0.5),
        **({"notes": notes} if notes else {}),
    }
    if not annotations and not judged_by:
        del found["judge"]
    write_json(workdir / "results.json", found)
    return found


def evaluate_samples(workdir: Path, config: Experiment) -> dict[str, Any]:
    """Measures `samples/<policy>/<split>.jsonl` of a recipe's workdir and writes `results.json`."""
    c = config.evaluation
    resamples = c.bootstrap
    samples = read_sampled(workdir)
    contests.score_alike(samples)
    if c.judge.startswith(REWARD):
        contests.score_samples(samples, c.text_judge)
    measured: Policies = {policy: {} for policy in samples}
    judged: dict[str, dict[str, np.ndarray]] = {policy: {} for policy in samples}
    for policy, split in [(p, s) for p, splits in samples.items() for s in splits]:
        records = samples[policy][split]
        m, judged[policy][split] = numbers(records, c.judge)
        shown = {r["id"]: judge.compared(c.judge, r["responses"]) for r in records}
        m.longer = {r["id"]: judge.longer(shown[r["id"]], [r["reference"]]) for r in records if r.get("reference")}
        measured[policy][split] = m
    texts = {
        p: {s: [r["responses"] for r in records] for s, records in splits.items()} for p, splits in samples.items()
    }
    options = variety.Options(c.paper_compat, c.cut_words, c.sentence_encoder, c.nli_model)
    cuts = variety.add(measured, texts, options)
    if judge.reads_texts(c.judge) and not c.judge.startswith(REWARD):
        heads, told = contests.judge_samples(samples, measured, c.text_judge, workdir, resamples)
    else:
        characters = {
            p: {s: np.array([np.mean([len(t) for t in row]) for row in rows]) for s, rows in splits.items()}
            for p, splits in texts.items()
        }
        heads, told = generalisation.comparisons(judged, characters, resamples), {}
    drawn = {policy: len(next(iter(splits.values()))[0]["responses"]) for policy, splits in samples.items()}
    found = {
        "schema": 1,
        "task": config.task,
        "judge": c.judge,
        **told,
        "config": read_json(workdir / "config.json"),
        "sampling": {p: read_json(i) for p in samples if (i := workdir / "samples" / p / "info.json").exists()},
        **_estimates(measured, drawn, cuts, resamples),
        "diversity_by_length": variety.by_length(measured, resamples, texts, c.paper_compat),
        "comparisons": significance.corrected(heads, null=0.5),
    }
    write_json(workdir / "results.json", found)
    return found


def _estimates(
    measured: Policies, samples: Mapping[str, int], cuts: Mapping[str, Mapping[str, Any]], resamples: int
) -> dict[str, Any]:
    """The parts of results.json that follow from what was measured."""
    pairs = [(a, b, s) for a, b in against_each_other(list(measured)) for s in measured[a] if s in measured[b]]
    held = measures.differences([(measured[a][s], measured[b][s]) for a, b, s in pairs], resamples)
    differences = [{"split": s, "a": a, "b": b} | told for (a, b, s), told in zip(pairs, held, strict=True)]
    for told, (a, b, split) in zip(differences, pairs, strict=True):
        if far(split) and "id" in measured[a] and "id" in measured[b]:
            told["gap"] = measures.gap_differences(measured[a], measured[b], split, resamples)
    gaps = {
        policy: {split: measures.gap(splits["id"], m, resamples) for split, m in splits.items() if far(split)}
        for policy, splits in measured.items()
        if "id" in splits and any(map(far, splits))
    }
    return {
        "policies": {
            policy: {
                split: {"n_prompts": len(m.prompts), "samples_per_prompt": samples[policy], "cut": cuts[policy][split]}
                | measures.estimates(m, resamples)
                for split, m in splits.items()
            }
            for policy, splits in measured.items()
        },
        "generalisation_gap": significance.corrected_gaps(gaps),
        "differences": significance.corrected(differences),
    }


def table(results: Mapping[str, Any]) -> str:
    """The main numbers as aligned text, a row for each policy and split."""
    head = ["policy", "split", "n", "win rate", "se", "gold", "score", "proxy score", "words"]
    head += ["per-input EAD", "across-input EAD"]
    rows = [head]
    for policy, splits in results["policies"].items():
        for split, m in splits.items():
            scopes = m["diversity"]
            won = m.get("win_rate")
            cells = [m.get(k) for k in ("gold", "score", "proxy_score", "length")]
            cells += [scopes.get(s, {}).get("ead") for s in ("per_input", "across_input")]
            rows.append([policy, split, str(m["n_prompts"]), _cell(won), f"{won['se']:.4f}" if won else ""])
            rows[-1] += map(_cell, cells)
    kept = [c for c in range(len(head)) if any(row[c] for row in rows[1:])]
    widths = [max(len(row[c]) for row in rows) for c in kept]
    return "\n".join("  ".join(row[c].ljust(w) for c, w in zip(kept, widths, strict=True)).rstrip() for row in rows)


def _cell(e: Estimate | None) -> str:
    return f"{e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" if e else ""


def _read(entries: Sequence[str], reference: str, log: Log) -> dict[str, Answers]:
    answers = {n: given.read_answers(p, n, log) for n, p in given.read_named(entries, "outputs").items()}
    if reference:
        if "reference" in answers:
            raise UserError("--outputs reference=…: that name is kept for --reference")
        answers["reference"] = given.read_answers([Path(reference)], "reference", log)
    return {name: Answers(_ordered(a.dataset), _ordered(a.responses)) for name, a in answers.items()}


def _verdicts(entries: Sequence[str], answers: Mapping[str, Answers], log: Log) -> dict[str, list[Verdict]]:
    """Of each name, the verdicts on its own prompts."""
    named = given.read_named(entries, "annotations")
    for name in named:
        if name not in (known := [n for n in answers if n != "reference"]):
            raise UserError(f"--annotations {name}=…: no --outputs has that name; known are {', '.join(known)}")
    read = {name: [v for path in paths for v in given.read_verdicts(path)] for name, paths in named.items()}
    for name, held in read.items():
        given.check(held, answers[name], name, log)
    return read


def _tell_lacking(answers: Mapping[str, Answers], log: Log) -> None:
    """Says who did not answer what others did; those who lack the same together."""
    asked = set().union(*(a.responses for a in answers.values()))
    lacking: dict[frozenset[given.Key], list[str]] = {}
    for name, a in answers.items():
        lacking.setdefault(frozenset(asked - a.responses.keys()), []).append(name)
    for gone, names in lacking.items():
        if gone:
            log(
                f"{', '.join(names)}: no answer to {len(gone):,} of the {len(asked):,} prompts of all files; two are "
                "compared on the prompts that both answered, and across inputs only where all prompts are the same"
            )


def _ordered(held: Mapping[given.Key, Any]) -> dict[given.Key, Any]:
    """By prompt in an order of its own, so that no number hangs on that of the file."""
    return {key: held[key] for key in in_order(held, lambda key: key)}


def _splits(datasets: Mapping[str, Mapping[given.Key, str]]) -> dict[str, list[str]]:
    """Of each name, `all` and its datasets, but for one that holds all prompts of whoever has it: it says no more.

    What is called `id` or `ood…` stays, as the gap hangs on it.
    """
    counted = {name: Counter(held.values()) for name, held in datasets.items()}
    known = {d for count in counted.values() for d in count if d and d != ALL}
    parts = {d for d in known if any(0 < count[d] < count.total() for count in counted.values())}
    parts |= {d for d in known if d == "id" or d.startswith("ood")}
    return {name: [ALL, *sorted(d for d in count if d in parts)] for name, count in counted.items()}


def numbers(records: Sequence[Mapping[str, Any]], by: str) -> tuple[Measured, np.ndarray]:
    """Each prompt's numbers, and a judge's value of each of its responses [B, N], where the samples carry it."""
    columns = {"score": "scores", "gold": "gold", PROXY[0]: "proxy_scores"}
    m = Measured([r["id"] for r in records], by_length=judge.by_length(by))
    judged_BN = np.zeros((len(records), 0))
    if key := PROXY[0] if by.startswith(REWARD) else {"reward": "score", "gold": "gold"}.get(by):
        if any(columns[key] not in r for r in records):
            raise UserError(f"config.evaluation.judge={by!r}: samples have no field {columns[key]!r} to judge by")
        judged_BN = np.array([r[columns[key]] for r in records], np.float64)
        # A prompt without a reference response has none to win against.
        against = [b for b, r in enumerate(records) if f"reference_{key}" in r]
        if against:
            reference_B1 = np.array([[records[b][f"reference_{key}"]] for b in against], np.float64)
            won_B = generalisation.outcomes(judged_BN[against], reference_B1)
            m.add_mean(WIN_RATE, [m.prompts[b] for b in against], won_B)
    if all("kl" in r for r in records):
        m.add_mean(KL, m.prompts, [r["kl"] for r in records])
    for name, column in columns.items():
        if all(column in r for r in records):
            m.add_mean((name,), m.prompts, [float(np.mean(r[column])) for r in records])
    return m, judged_BN
