"""The texts behind a results.json, where they are still at hand: for the explorer and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import outputs
from jaxrlhf.evaluation.measures import in_order
from jaxrlhf.files import UserError, read_json, read_records
from jaxrlhf.names import POLICIES

Record = Mapping[
    str, Any
]  # "id", "prompt", "responses"; where known "reference", "scores", "gold", "finished", "verdicts"
Samples = dict[str, dict[str, Sequence[Record]]]  # policy -> split
Verdicts = dict[outputs.Key, list[outputs.Verdict]]


def read(workdir: Path, results: Mapping[str, Any]) -> tuple[Samples, list[str]]:
    """Each policy's samples, and a line for each place where there should be some and are none.

    They lie in the workdir, in the files that `evaluate --outputs` was given, or in the workdirs that were compared.

    Raises:
      UserError: a file of the workdir's samples does not parse.
    """
    if results.get("compared"):
        found, gone = {}, []
        for name, folder in results["compared"].items():
            if not (path := Path(folder) / "results.json").exists():
                gone.append(f"{name}: {path} is no longer there.")
                continue
            held, lost = read(Path(folder), read_json(path))
            found |= {f"{name}/{policy}": splits for policy, splits in held.items()}
            gone += [f"{name}/{line}" for line in lost]
        return found, gone
    if isinstance(results.get("config", {}).get("outputs"), list):
        return _read_outputs(results)
    return _read_folder(workdir / "samples", results["policies"]), []


def _read_folder(folder: Path, policies: Mapping[str, Any]) -> Samples:
    """Files are found by listing, never by a name that results.json gives."""
    listed = {p.name: p for p in sorted(folder.glob("*")) if p.is_dir()}
    return {
        p: {f.stem: _checked(f) for f in sorted(listed[p].glob("*.jsonl")) if f.stem in splits}
        for p, splits in policies.items()
        if p in listed
    }


def _checked(path: Path) -> Sequence[Record]:
    records = read_records(path, ("id", "prompt", "responses"))
    for i, record in enumerate(records, 1):
        texts = record["responses"]
        if not isinstance(record["prompt"], str) or not isinstance(texts, list) or set(map(type, texts)) - {str}:
            raise UserError(f"{path}, record {i}: the prompt must be a text, and responses a list of texts")
        for field in ("scores", "gold"):
            values = record.get(field, [0.0] * len(texts))
            if not isinstance(values, list) or len(values) != len(texts) or set(map(type, values)) - {int, float}:
                raise UserError(f"{path}, record {i}: {field} must be {len(texts)} numbers, one a response")
        ended = record.get("finished", [True] * len(texts))
        if not isinstance(ended, list) or len(ended) != len(texts) or set(map(type, ended)) - {bool}:
            raise UserError(f"{path}, record {i}: finished must be {len(texts)} times true or false, one a response")
    return [{k: v for k, v in record.items() if k != "verdicts"} for record in records]  # annotations alone say who won


def _read_outputs(results: Mapping[str, Any]) -> tuple[Samples, list[str]]:
    config, found, gone = results["config"], {}, []
    named = outputs.read_named(config["outputs"], "outputs")
    if config.get("reference"):
        named["reference"] = [Path(config["reference"])]
    judged = dict(_judged(config.get("annotations", []), gone))
    for name, paths in named.items():
        try:
            answers = outputs.read_answers(paths, name, lambda _: None)
        except UserError as error:
            gone.append(f"{name}: {error}.")
            continue
        measured = results["policies"].get(name, {})
        words = [sum(len(t.split()) for t in texts) / len(texts) for texts in answers.responses.values()]
        told = measured.get("all", {}).get("length", {}).get("mean", math.nan)
        if math.isclose(told, sum(words) / len(words), rel_tol=1e-9):
            said = judged.get(name, {})
            found[name] = {s: _records(answers, s, said) for s in measured}
        else:
            gone.append(f"{name}: {', '.join(map(str, paths))} no longer holds the texts that were measured.")
    return found, gone


def _judged(annotations: Sequence[str], gone: list[str]) -> Iterator[tuple[str, Verdicts]]:
    """Of each policy, the verdicts on each prompt; what is no longer there is added to `gone`."""
    for name, paths in outputs.read_named(annotations, "annotations").items():
        held: Verdicts = {}
        for path in paths:
            try:
                for verdict in outputs.read_verdicts(path):
                    held.setdefault(verdict.key, []).append(verdict)
            except UserError as error:
                gone.append(f"{name}, its verdicts: {error}.")
        yield name, held


def _records(answers: outputs.Answers, split: str, judged: Verdicts) -> Sequence[Record]:
    return [
        {"id": key, "prompt": key[0], "responses": texts} | _said(judged.get(key, []), texts)
        for key, texts in answers.responses.items()
        if split in ("all", answers.dataset[key])
    ]


def _said(judged: Sequence[outputs.Verdict], texts: Sequence[str]) -> dict[str, list[str]]:
    """What was said of each response that was judged; of a chance to win, the chance."""
    words = {1.0: "won", 0.0: "lost", 0.5: "draw"}
    held = [""] * len(texts)
    for verdict in judged:
        if (i := outputs.which(verdict, texts)) is not None:
            held[i] = words.get(verdict.won, f"chance to win {verdict.won:.2f}")
    return {"verdicts": held} if any(held) else {}


def read_sampled(workdir: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the stage `sample` left to measure: policy -> split -> records, by id in an order that is not the files'.

    Raises:
      UserError: there is none, policies have other ids on a split, or a record has other counts than its first.
    """
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
    return in_order(records, lambda record: record["id"])
