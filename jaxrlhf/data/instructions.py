"""Real instructions and answers: AlpacaEval's files of outputs and verdicts, and seed tasks, as records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxrlhf.config import Files
from jaxrlhf.files import UserError, read_records

Record = dict[str, str]


@dataclass(frozen=True)
class Instructions:
    """Records of each use, and how many were passed over, by reason."""

    demonstrations: list[Record]
    validation: list[Record]
    preferences: dict[str, list[Record]]  # "train", "id", "ood_..."
    ppo_prompts: list[Record]
    splits: dict[str, list[Record]]
    notes: dict[str, int]


def paths(c: Files) -> dict[str, list[Path]]:
    """The files behind each key; `UserError` that names the key where nothing is found."""
    found = {key: _glob(c.root, key, getattr(c, key)) for key in ("demonstrations", "annotations")}
    found["reference"] = _glob(c.root, "reference", (c.reference,))
    found["ood_files"] = []
    for entry in c.ood_files:
        if "=" not in entry:
            raise UserError(f"config.files.ood_files: {entry!r} must be name=path")
        found["ood_files"] += _glob(c.root, "ood_files", (entry.split("=", 1)[1],))
    return found


def read(c: Files, seed: int) -> Instructions:
    """Reads every file, checks every record, and puts each instruction on one side of the held-out line for good."""
    if not 0 < c.held_out < 1:
        raise UserError(f"config.files.held_out={c.held_out}: a share between 0 and 1")
    files = paths(c)
    notes: dict[str, int] = {"empty_outputs": 0, "draws": 0, "missing_verdicts": 0, "without_reference": 0}
    place = _placer(c, seed)
    reference = {r["instruction"]: r for r in read_records(files["reference"][0], ("instruction", "output"))}
    outputs = [r for p in files["demonstrations"] for r in read_records(p, ("instruction", "output", "dataset"))]
    demonstrations: dict[str, list[Record]] = {"train": [], "id": []}
    for i, r in enumerate(outputs):
        where = place(r)
        if where in demonstrations and _text(r, "output").strip():
            demonstrations[where].append(_record(c, f"demonstration-{i}", r["instruction"], r["output"]))
        elif where in demonstrations:
            notes["empty_outputs"] += 1
    prompts = _prompts(outputs, place)
    splits = {}
    for split in ("id", *(f"ood_{s}" for s in c.ood_sources)):
        splits[split] = [
            _record(c, f"{split}-{i}", text, _text(reference[text], "output") if text in reference else "")
            for i, text in enumerate(_limited(c, prompts.get(split, [])))
        ]
    for entry, path in zip(c.ood_files, files["ood_files"], strict=True):
        name = f"ood_{entry.split('=', 1)[0]}"
        tasks = list(_seed_tasks(path))
        chosen = _limited(c, tasks)
        splits[name] = [_record(c, f"{name}-{i}", text, answer) for i, (text, answer) in enumerate(chosen)]
    for split, records in splits.items():
        if not records:
            raise UserError(f"config.files: split {split!r} is empty; no record's `dataset` leads to it")
        notes["without_reference"] += sum(not r["response"] for r in records)
    return Instructions(
        demonstrations=_nonempty("demonstrations", demonstrations["train"]),
        validation=_nonempty("held-out demonstrations", demonstrations["id"]),
        preferences=_preferences(c, files["annotations"], place, notes),
        ppo_prompts=[_record(c, f"ppo-{i}", text, "") for i, text in enumerate(prompts["train"])],
        splits=splits,
        notes=notes,
    )


def _glob(root: str, key: str, patterns: Iterable[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        path = Path(root) / pattern
        matches = sorted(path.parent.glob(path.name))
        if not matches:
            raise UserError(f"config.files.{key}: nothing at {path}; set --config.files.root to the folder of the data")
        found += matches
    if not found:
        raise UserError(f"config.files.{key}: names no file")
    return found


def _placer(c: Files, seed: int) -> Callable[[Mapping[str, str]], str]:
    """The split of a record by its source; in-distribution ones by a hash of their instruction, "train" or "id"."""

    def place(r: Mapping[str, str]) -> str:
        if r["dataset"] in c.id_sources:
            digest = hashlib.sha256(f"{seed}/{r['instruction']}".encode("utf-8", "surrogatepass")).digest()
            return "id" if int.from_bytes(digest[:8]) < c.held_out * 2**64 else "train"
        return f"ood_{r['dataset']}" if r["dataset"] in c.ood_sources else ""

    return place


def _prompts(outputs: list[Record], place: Callable[[Mapping[str, str]], str]) -> dict[str, list[str]]:
    """The distinct instructions of each split, in the order of the files."""
    found: dict[str, dict[str, None]] = {}
    for r in outputs:
        found.setdefault(place(r), {})[r["instruction"]] = None
    return {split: list(texts) for split, texts in found.items()}


def _preferences(
    c: Files, files: list[Path], place: Callable[[Mapping[str, str]], str], notes: dict[str, int]
) -> dict[str, list[Record]]:
    """Pairs of each split; a draw or a missing verdict is no pair, and counted."""
    pairs: dict[str, list[Record]] = {"train": [], "id": [], **{f"ood_{s}": [] for s in c.ood_sources}}
    for path in files:
        for i, r in enumerate(read_records(path, ("instruction", "output_1", "output_2", "preference", "dataset")), 1):
            where, verdict = place(r), r["preference"]
            if where not in pairs:
                continue
            if verdict is None:
                notes["missing_verdicts"] += 1
            elif verdict in (0, 1.5):
                notes["draws"] += 1
            elif verdict in (1, 2):
                won, lost = (1, 2) if verdict == 1 else (2, 1)
                pairs[where].append(
                    {
                        "id": f"{path.stem}-{i}",
                        "prompt": c.prompt.replace("{instruction}", r["instruction"]),
                        "chosen": _text(r, f"output_{won}"),
                        "rejected": _text(r, f"output_{lost}"),
                        "chosen_finished": "1",
                        "rejected_finished": "1",
                    }
                )
            else:
                raise UserError(f"{path}, record {i}: preference is {verdict!r}; known are 1, 2, 1.5, 0 and null")
    _nonempty("annotations of training prompts", pairs["train"])
    return {split: found for split, found in pairs.items() if found}


def _seed_tasks(path: Path) -> Iterable[tuple[str, str]]:
    """Instruction, with its first input where there is one, and the answer."""
    for i, r in enumerate(read_records(path, ("instruction", "instances")), 1):
        try:
            given, answer = r["instances"][0]["input"], r["instances"][0]["output"]
        except (IndexError, KeyError, TypeError):
            raise UserError(f"{path}, task {i}: `instances` must hold {{input, output}}") from None
        yield (f"{r['instruction']}\n\n{given}" if given.strip() else r["instruction"]), answer


def _limited(c: Files, records: list) -> list:
    return records[: c.evaluation_prompts] if c.evaluation_prompts else records


def _record(c: Files, name: str, instruction: str, response: str) -> Record:
    return {"id": name, "prompt": c.prompt.replace("{instruction}", instruction), "response": response}


def _text(r: Mapping[str, object], field: str) -> str:
    value = r[field]
    if not isinstance(value, str):
        raise UserError(f"config.files: field {field!r} of {str(r.get('instruction'))[:40]!r} is no text")
    return value


def _nonempty(what: str, records: list[Record]) -> list[Record]:
    if not records:
        raise UserError(f"config.files: there are no {what}; see id_sources and held_out")
    return records
