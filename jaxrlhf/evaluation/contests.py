"""Who wins: what a judge says of samples and of anybody's outputs, against the reference and head to head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.evaluation import generalisation, judge, outputs, proxy
from jaxrlhf.evaluation.judge import Judge, Match
from jaxrlhf.evaluation.measures import ALL, WIN_RATE, Measured
from jaxrlhf.files import UserError
from jaxrlhf.logs import progress, say

Log = Callable[[str], None]
Policies = dict[str, dict[str, Measured]]  # policy -> split
Samples = dict[str, list[dict[str, Any]]]  # split -> records


def score_alike(samples: Mapping[str, Samples]) -> None:
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


def score_samples(samples: Mapping[str, Samples], judged_by: Judge) -> None:
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


def score_outputs(answers: Mapping[str, outputs.Answers], judged_by: Judge) -> dict[str, dict[Any, np.ndarray]]:
    """A reward model's scores of each policy's responses to each prompt; all count as finished."""
    held = [(name, key, t) for name, a in answers.items() for key, texts in a.responses.items() for t in texts]
    scored = iter(proxy.scores(judged_by, [proxy.Answer(key[0], text) for _, key, text in held]))
    return {
        name: {key: np.array([next(scored) for _ in texts]) for key, texts in a.responses.items()}
        for name, a in answers.items()
    }


def judge_outputs(
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
        matches += [Match(ALL, a, b, items)] * bool(items)
    if scores:
        found = [{k: _won(scores[m.a][k], scores[m.b][k]) for k in m.items} for m in matches]
        return list(zip(matches, found, strict=True)), {}
    if not matches:
        raise UserError(f"--judge={judged_by.name}: no two files answer the same prompt; give --reference=FILE")
    found, told = judge.decide(judged_by, matches, workdir, log)
    return list(zip(matches, found, strict=True)), told


def judge_samples(
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
    met = []
    for match, won in zip(matches, found, strict=True):
        if won and match.b == "reference":
            measured[match.a][match.split].add_mean(WIN_RATE, list(won), list(won.values()))
        elif won:
            met.append((match, match.split, won))
    return heads(met, resamples, judge.by_length(judged_by.name)), told


def heads(
    jobs: Sequence[tuple[Match, str, judge.Outcomes]], resamples: int, by_length: bool = False
) -> list[dict[str, Any]]:
    """The comparisons of results.json: a match on one of its splits, and its outcomes there."""

    def one(job: tuple[Match, str, judge.Outcomes]) -> dict[str, Any]:
        (match, split, won), longer = job, job[0].longer
        who = {"split": split, "a": match.a, "b": match.b}
        won_B, longer_B = np.array(list(won.values())), np.array([longer[k] for k in won])
        return generalisation.against(who, won_B, longer_B, resamples, by_length)

    # Threads, as numpy lets go of the interpreter.
    with progress("comparing", len(jobs), delay=2) as bar, ThreadPoolExecutor() as pool:
        found = []
        for head in pool.map(one, jobs):
            found.append(head)
            bar.update()
    return found


def _won(a_N: np.ndarray, b_M: np.ndarray) -> float:
    return float(generalisation.outcomes(a_N[None], b_M[None])[0])
