"""The texts behind a results.json, where they are still at hand: for the explorer and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import outputs
from jaxrlhf.files import UserError, read_json, read_records

Record = Mapping[str, Any]  # "id", "prompt", "responses"; "reference", "scores", "gold", "finished" where known
Samples = dict[str, dict[str, Sequence[Record]]]  # policy -> split


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
    return records


def _read_outputs(results: Mapping[str, Any]) -> tuple[Samples, list[str]]:
    config, found, gone = results["config"], {}, []
    named = outputs.read_named(config["outputs"], "outputs")
    if config.get("reference"):
        named["reference"] = [Path(config["reference"])]
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
            found[name] = {s: _records(answers, s) for s in measured}
        else:
            gone.append(f"{name}: {', '.join(map(str, paths))} no longer holds the texts that were measured.")
    return found, gone


def _records(answers: outputs.Answers, split: str) -> Sequence[Record]:
    return [
        {"id": key, "prompt": key[0], "responses": texts}
        for key, texts in answers.responses.items()
        if split in ("all", answers.dataset[key])
    ]
