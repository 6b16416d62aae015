"""`results.json`: every number that the report shows, from a recipe's samples or from anybody's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.evaluation import generalisation, judge, measures, outputs, proxy, significance, variety
from jaxrlhf.evaluation.judge import REWARD, Judge, Match
from jaxrlhf.evaluation.measures import PROXY, WIN_RATE, Measured, against_each_other
from jaxrlhf.evaluation.statistics import Estimate
from jaxrlhf.files import UserError, read_json, read_records, write_json
from jaxrlhf.logs import progress, say
from jaxrlhf.names import POLICIES

if TYPE_CHECKING:
    from jaxrlhf.config import Experiment

Log = Callable[[str], None]
Policies = dict[str, dict[str, Measured]]  # policy -> split
Samples = dict[str, list[dict[str, Any]]]  # split -> records


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
    answers, verdicts = _read(outputs, reference, annotations, log)
    longer = _read_longer(annotations)
    scores = _score_outputs(answers, judged_by) if judged_by and judged_by.name.startswith(REWARD) else {}
    compared, told = _judge_outputs(answers, judged_by, scores, workdir, log) if judged_by else ([], {})
    for match, won in compared:
        if match.b == "reference":
            verdicts[match.a] = {k: (answers[match.a].dataset[k], o) for k, o in won.items()}
            longer[match.a] = match.longer
    measured: Policies = {name: {} for name in answers}
    texts: dict[str, dict[str, list[list[str]]]] = {name: {} for name in answers}
    samples = {name: len(next(iter(found.responses.values()))) for name, found in answers.items()}
    for name, split in [(n, s) for n, found in answers.items() for s in _splits(found.dataset.values())]:
        found = answers[name]
        keys = [k for k, d in found.dataset.items() if split in ("all", d)]
        m = measured[name][split] = Measured(keys)
        judged = {k: o for k, (d, o) in verdicts.get(name, {}).items() if split in ("all", d)}
        if judged:
            m.add_mean(WIN_RATE, list(judged), list(judged.values()))
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
        for s in _splits(answers[match.a].dataset.values())
        if (part := {k: o for k, o in won.items() if s in ("all", answers[match.a].dataset[k])})
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
        },
        **_estimates(measured, samples, cuts, resamples),
        "comparisons": significance.corrected(_heads(jobs, resamples), null=0.5),
    }
    if not annotations and not judged_by:
        del found["judge"]
    write_json(workdir / "results.json", found)
    return found


def evaluate_samples(workdir: Path, config: Experiment) -> dict[str, Any]:
    """Measures `samples/<policy>/<split>.jsonl` of a recipe's workdir and writes `results.json`."""
    c = config.evaluation
    resamples = c.bootstrap
    samples = _read_samples(workdir)
    _score_alike(samples)
    if c.judge.startswith(REWARD):
        _score_samples(samples, c.text_judge)
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
        heads, told = _judge_samples(samples, measured, c.text_judge, workdir, resamples)
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
        "comparisons": significance.corrected(heads, null=0.5),
    }
    write_json(workdir / "results.json", found)
    return found


def _score_alike(samples: Mapping[str, Samples]) -> None:
    """Gives equal answers to a prompt one score, so that they draw.

    The reward model gave each its own, in batches of other shapes, which can differ in the last digit.
    """
    known: dict[tuple[Any, ...], float] = {}
    for records in [held for splits in samples.values() for held in splits.values()]:
        for r in records:
            if "reference_score" in r:
                known.setdefault((r["prompt"], r["reference"], True), r["reference_score"])
            finished = r.get("finished", [True] * len(r["responses"]))
            for i, answer in enumerate(zip(r["responses"], finished, strict=True)):
                r["scores"][i] = known.setdefault((r["prompt"], *answer), r["scores"][i])


def _score_samples(samples: Mapping[str, Samples], judged_by: Judge) -> None:
    """Gives records the numbers of a reward model that reads texts: `proxy_scores`, and `reference_proxy_score`."""
    records = [r for splits in samples.values() for held in splits.values() for r in held]
    asked, places = [], []
    for r in records:
        finished = r.get("finished", [True] * len(r["responses"]))
        answers = [*zip(r["responses"], finished, strict=True), *[(r["reference"], True)] * bool(r.get("reference"))]
        places.append((len(asked), len(r["responses"]), len(answers)))
        asked += [proxy.Answer(r["prompt"], *answer) for answer in answers]
    scored = proxy.scores(judged_by, asked)
    for r, (start, responses, answers) in zip(records, places, strict=True):
        r["proxy_scores"] = scored[start : start + responses]
        if answers > responses:
            r["reference_proxy_score"] = scored[start + responses]


def _score_outputs(answers: Mapping[str, outputs.Answers], judged_by: Judge) -> dict[str, dict[Any, np.ndarray]]:
    """A reward model's scores of each policy's responses to each prompt; all count as finished."""
    held = [(name, key, t) for name, a in answers.items() for key, texts in a.responses.items() for t in texts]
    scored = iter(proxy.scores(judged_by, [proxy.Answer(key[0], text) for _, key, text in held]))
    return {
        name: {key: np.array([next(scored) for _ in texts]) for key, texts in a.responses.items()}
        for name, a in answers.items()
    }


def _judge_outputs(
    answers: Mapping[str, outputs.Answers],
    judged_by: Judge,
    scores: Mapping[str, Mapping[Any, np.ndarray]],
    workdir: Path,
    log: Log,
) -> tuple[list[tuple[Match, judge.Outcomes]], dict[str, Any]]:
    """Each policy against the reference and against each other, on the prompts that both answered."""
    matches = []
    for b, a in combinations(["reference", *(n for n in answers if n != "reference")], 2):
        one, other = (answers[n].responses if n in answers else {} for n in (a, b))
        shown = partial(judge.compared, judged_by.name)
        items = {k: (k[0], shown(one[k]), shown(other[k])) for k in one if k in other}
        matches += [Match("all", a, b, items)] * bool(items)
    if scores:
        found = [{k: _won(scores[m.a][k], scores[m.b][k]) for k in m.items} for m in matches]
        return list(zip(matches, found, strict=True)), {}
    if not matches:
        raise UserError(f"--judge={judged_by.name}: no two files answer the same prompt; give --reference=FILE")
    found, told = judge.decide(judged_by, matches, workdir, log)
    return list(zip(matches, found, strict=True)), told


def _judge_samples(
    samples: Mapping[str, Samples], measured: Policies, judged_by: Judge, workdir: Path, resamples: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Adds each policy's win rates against the reference to `measured`; returns the comparisons head to head."""

    def shown(record: Mapping[str, Any]) -> Sequence[str]:
        return judge.compared(judged_by.name, record["responses"])

    matches = [
        Match(s, policy, "reference", {r["id"]: (r["prompt"], shown(r), [r["reference"]]) for r in known})
        for policy, splits in samples.items()
        for s, records in splits.items()
        if (known := [r for r in records if r.get("reference")])
    ]
    for b, a in combinations(samples, 2):
        for s in (s for s in samples[a] if s in samples[b]):
            both = zip(samples[a][s], samples[b][s], strict=True)
            items = {x["id"]: (x["prompt"], shown(x), shown(y)) for x, y in both}
            matches.append(Match(s, a, b, items))
    found, told = judge.decide(judged_by, matches, workdir, say)
    heads = []
    for match, won in zip(matches, found, strict=True):
        if won and match.b == "reference":
            measured[match.a][match.split].add_mean(WIN_RATE, list(won), list(won.values()))
        elif won:
            heads.append((match, match.split, won))
    return _heads(heads, resamples), told


def _heads(jobs: Sequence[tuple[Match, str, judge.Outcomes]], resamples: int) -> list[dict[str, Any]]:
    """The comparisons of results.json: a match on one of its splits, and its outcomes there."""

    def one(job: tuple[Match, str, judge.Outcomes]) -> dict[str, Any]:
        (match, split, won), longer = job, job[0].longer
        who = {"split": split, "a": match.a, "b": match.b}
        won_B, longer_B = np.array(list(won.values())), np.array([longer[k] for k in won])
        return generalisation.against(who, won_B, longer_B, resamples)

    # Threads, as numpy lets go of the interpreter.
    with progress("comparing", len(jobs), delay=2) as bar, ThreadPoolExecutor() as pool:
        found = []
        for head in pool.map(one, jobs):
            found.append(head)
            bar.update()
    return found


def _won(a_N: np.ndarray, b_M: np.ndarray) -> float:
    return float(generalisation.outcomes(a_N[None], b_M[None])[0])


def _read_longer(annotations: Sequence[str]) -> dict[str, dict[outputs.Key, float]]:
    return {n: outputs.read_longer(paths) for n, paths in outputs.read_named(annotations, "annotations").items()}


def _estimates(
    measured: Policies, samples: Mapping[str, int], cuts: Mapping[str, Mapping[str, Any]], resamples: int
) -> dict[str, Any]:
    """The parts of results.json that follow from what was measured."""
    pairs = [(a, b, s) for a, b in against_each_other(list(measured)) for s in measured[a] if s in measured[b]]
    differences = []
    for a, b, split in pairs:
        told: dict[str, Any] = {"split": split, "a": a, "b": b}
        told |= measures.differences(measured[a][split], measured[b][split], resamples)
        if split != "id" and "id" in measured[a] and "id" in measured[b]:
            told["gap"] = measures.gap_differences(measured[a], measured[b], split, resamples)
        differences.append(told)
    gaps = {
        policy: {split: measures.gap(splits["id"], m, resamples) for split, m in splits.items() if split != "id"}
        for policy, splits in measured.items()
        if "id" in splits
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
        "diversity_by_length": variety.by_length(measured, resamples),
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


def _read(
    entries: Sequence[str], reference: str, annotations: Sequence[str], log: Log
) -> tuple[dict[str, outputs.Answers], dict[str, dict[outputs.Key, tuple[str, float]]]]:
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


def _read_samples(workdir: Path) -> dict[str, Samples]:
    found = {}
    for policy in POLICIES:
        paths = {p.stem: p for p in (workdir / "samples" / policy).glob("*.jsonl")}
        order = [s for s in ("id",) if s in paths] + sorted(s for s in paths if s != "id")
        if paths:
            found[policy] = {s: _read_split(paths[s]) for s in order}
    if not found:
        raise UserError(f"{workdir}/samples holds no samples; run `jaxrlhf sample` first")
    # Head to head, record b of one policy stands against record b of the other.
    first: dict[str, tuple[str, list[Any]]] = {}
    for policy, splits in found.items():
        for split, records in splits.items():
            other, ids = first.setdefault(split, (policy, [r["id"] for r in records]))
            if ids != [r["id"] for r in records]:
                raise UserError(
                    f"{workdir}/samples/{policy}/{split}.jsonl: its ids are not those of {other}/{split}.jsonl; "
                    f"delete it and run `jaxrlhf sample` again"
                )
    return found


def _read_split(path: Path) -> list[dict[str, Any]]:
    records = read_records(path, ("id", "prompt", "responses", "scores"))
    if not records:
        raise UserError(f"{path}: holds no record; delete it and run `jaxrlhf sample` again")
    n = len(records[0]["responses"])
    for i, record in enumerate(records, 1):
        for field in ("responses", "scores", "gold", "finished"):
            if field in record and (not n or len(record[field]) != n):
                raise UserError(
                    f"{path}, record {i}: {len(record[field])} {field}; must be {max(n, 1)}, as in record 1"
                )
    return records


def numbers(records: Sequence[Mapping[str, Any]], by: str) -> tuple[Measured, np.ndarray]:
    """Each prompt's numbers, and a judge's value of each of its responses [B, N], where the samples carry it."""
    columns = {"score": "scores", "gold": "gold", PROXY[0]: "proxy_scores"}
    m, judged_BN = Measured([r["id"] for r in records]), np.zeros((len(records), 0))
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
    for name, column in columns.items():
        if all(column in r for r in records):
            m.add_mean((name,), m.prompts, [float(np.mean(r[column])) for r in records])
    return m, judged_BN
