"""The `sample` stage: every policy's responses to every split's prompts, scored, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from jaxrlhf import hosts, names, policies, rollouts, scoring
from jaxrlhf.data import batches
from jaxrlhf.experiment import Run
from jaxrlhf.files import write_json, write_records
from jaxrlhf.types import PromptBatch, Sample, Top


def sample(run: Run) -> None:
    """Writes samples/<policy>/<split>.jsonl for every policy of the run, skipping what is there whole already."""
    c = run.config.sampling
    reward, policy = scoring.of_run(run), cache(run.policy)  # each checkpoint is checked and read once
    folder = run.workdir / "samples"
    ratios = c.temperature > 0 and c.top_k == 0 and c.top_p == 1  # else SFT may never give what the policy does
    for i, (split, records) in enumerate(run.task.splits.items()):
        paths = {p: folder / p / f"{split}.jsonl" for p in names.POLICIES}
        references = _references(run, reward, records)
        there = hosts.decided(lambda paths=paths: [p for p, path in paths.items() if path.exists()])
        if not {"sft", "bon"} <= set(there):
            pool = _respond(run, "sft", policy("sft"), scoring.scored_by(run, reward), records, c.pool, i)
            first_BN = np.broadcast_to(np.arange(c.samples_per_prompt), (len(records), c.samples_per_prompt))
            assert pool.scores_BN is not None
            rng = np.random.default_rng([run.seed("best of n"), i])
            best_BN = policies.best_of_n(pool.scores_BN, c.best_of, c.samples_per_prompt, rng)
            write_records(paths["sft"], _rows(run, records, references, pool, first_BN))
            kl_B = policies.best_of_n_kl(_by_response(pool), c.best_of)
            write_records(paths["bon"], _rows(run, records, references, pool, best_BN, kl_B))
        for name in (p for p in ("ppo", *names.METHODS) if p in run.config.stages and p not in there):
            scored_by = scoring.scored_by(run, reward)
            scored_by = _with_log_ratio(run, scored_by, policy(name), policy("sft")) if ratios else scored_by
            drawn, kl_B = _respond(run, name, policy(name), scored_by, records, c.samples_per_prompt, i), None
            if ratios and drawn.scores_BN is not None:
                drawn, kl_B = replace(drawn, scores_BN=drawn.scores_BN[..., 0]), drawn.scores_BN[..., 1].mean(-1)
            every_BN = np.broadcast_to(np.arange(c.samples_per_prompt), (len(records), c.samples_per_prompt))
            write_records(paths[name], _rows(run, records, references, drawn, every_BN, kl_B))
    write_json(folder / "bon" / "info.json", {"best_of": c.best_of, "pool": c.pool})
    cut = batches.cut(run.task.splits, run.task.tokenizer, **run.lengths, fields=("response",))
    run.finish("sample", {"prompts": {s: len(r) for s, r in run.task.splits.items()}} | cut)


def _respond(
    run: Run, stage: str, top: Top, scored_by: policies.SomeScores, records: Sequence, samples: int, index: int
) -> policies.Responses:
    split = list(run.task.splits)[index]
    return policies.respond(
        run,
        top,
        records,
        samples=samples,
        key=run.key(f"sample {stage}", index),
        generation=policies.generation(run),
        scored_by=scored_by,
        title=f"{stage} on {split}",
    )


def _with_log_ratio(run: Run, scored_by: policies.Score, top: Top, ref: Top) -> policies.SomeScores:
    """Beside each response's score, its log-probability less SFT's."""

    def both(prompts: PromptBatch, drawn: Sample, samples: int) -> list[policies.Scores]:
        rows, R = policies.joined(prompts, drawn, samples), drawn.tokens_BR.shape[1]
        ratio_M = rollouts.log_ratio(run.arch, run.base[0], top, ref, *rows, R, run.config.sampling.temperature)
        return [scored_by(prompts, drawn, samples), ratio_M]

    return both


def _by_response(pool: policies.Responses) -> np.ndarray:
    """Scores [B, M] of a pool, of equal responses the same: in a batch, equal rows can differ in the last digit."""
    assert pool.scores_BN is not None
    found_BM = np.zeros_like(pool.scores_BN)
    for b, texts in enumerate(pool.texts):
        known: dict[tuple[str, bool], float] = {}
        for j, text in enumerate(texts):
            found_BM[b, j] = known.setdefault((text, bool(pool.finished_BN[b, j])), float(pool.scores_BN[b, j]))
    return found_BM


def _references(run: Run, reward: scoring.Reward, records: Sequence) -> list[dict[str, float]]:
    """The judges' numbers for the reference responses, against which policies win or lose."""
    found = []
    for record, value in zip(records, scoring.of_responses(run, reward, records, "response").tolist(), strict=True):
        judged = {"reference_score": value} if record["response"] else {}
        if run.task.gold is not None:
            judged["reference_gold"] = run.task.gold(record["facts"], record["response"], True)
        found.append(judged)
    return found


def _rows(
    run: Run,
    records: Sequence,
    references: list[dict[str, float]],
    drawn: policies.Responses,
    index_BN: np.ndarray,
    kl_B: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    assert drawn.scores_BN is not None
    rows = []
    for b, record in enumerate(records):
        picked = index_BN[b].tolist()
        row = {
            "id": record["id"],
            "prompt": record["prompt"],
            "reference": record["response"],
            "responses": [drawn.texts[b][j] for j in picked],
            "finished": [bool(drawn.finished_BN[b, j]) for j in picked],
            "scores": [round(float(drawn.scores_BN[b, j]), 6) for j in picked],
            **references[b],
        }
        if run.task.gold is not None:
            golds = [run.task.gold(record["facts"], drawn.texts[b][j], bool(drawn.finished_BN[b, j])) for j in picked]
            row["gold"] = golds
        if kl_B is not None:
            row["kl"] = round(float(kl_B[b]), 6)
        rows.append(row)
    return rows
