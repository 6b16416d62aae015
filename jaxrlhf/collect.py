"""The `sample` stage: every policy's responses to every split's prompts, scored, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from jaxrlhf import names, policies, scoring
from jaxrlhf.data import batches
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError, write_json, write_records
from jaxrlhf.types import Top


def sample(run: Run) -> None:
    """Writes samples/<policy>/<split>.jsonl for every policy of the run, skipping what is there whole already."""
    c = run.config.sampling
    if c.best_of > c.pool or c.samples_per_prompt > c.pool:
        raise UserError(
            f"config.sampling.pool={c.pool} must be at least best_of={c.best_of} and samples_per_prompt="
            f"{c.samples_per_prompt}"
        )
    reward, policy = scoring.of_run(run), cache(run.policy)  # each checkpoint is checked and read once
    folder = run.workdir / "samples"
    for i, (split, records) in enumerate(run.task.splits.items()):
        paths = {p: folder / p / f"{split}.jsonl" for p in names.POLICIES}
        references = _references(run, reward, records)
        if not (paths["sft"].exists() and paths["bon"].exists()):
            pool = _respond(run, "sft", policy("sft"), reward, records, c.pool, i)
            first_BN = np.broadcast_to(np.arange(c.samples_per_prompt), (len(records), c.samples_per_prompt))
            assert pool.scores_BN is not None
            rng = np.random.default_rng([run.seed("best of n"), i])
            best_BN = policies.best_of_n(pool.scores_BN, c.best_of, c.samples_per_prompt, rng)
            write_records(paths["sft"], _rows(run, records, references, pool, first_BN))
            write_records(paths["bon"], _rows(run, records, references, pool, best_BN))
        for name in (p for p in ("ppo", *names.METHODS) if p in run.config.stages and not paths[p].exists()):
            drawn = _respond(run, name, policy(name), reward, records, c.samples_per_prompt, i)
            every_BN = np.broadcast_to(np.arange(c.samples_per_prompt), (len(records), c.samples_per_prompt))
            write_records(paths[name], _rows(run, records, references, drawn, every_BN))
    write_json(folder / "bon" / "info.json", {"best_of": c.best_of, "pool": c.pool})
    cut = batches.cut(run.task.splits, run.task.tokenizer, **run.lengths, fields=("response",))
    run.finish("sample", {"prompts": {s: len(r) for s, r in run.task.splits.items()}} | cut)


def _respond(
    run: Run, stage: str, top: Top, reward: scoring.Reward, records: Sequence, samples: int, index: int
) -> policies.Responses:
    split = list(run.task.splits)[index]
    return policies.respond(
        run,
        top,
        records,
        samples=samples,
        key=run.key(f"sample {stage}", index),
        generation=policies.generation(run),
        scored_by=scoring.scored_by(run, reward),
        title=f"{stage} on {split}",
    )


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
    run: Run, records: Sequence, references: list[dict[str, float]], drawn: policies.Responses, index_BN: np.ndarray
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
        rows.append(row)
    return rows
