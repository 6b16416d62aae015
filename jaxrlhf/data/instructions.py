"""Real instructions and answers: AlpacaEval's files of outputs and verdicts, and seed tasks, as records."""

from __future__ import annotations

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrlhf.config import Files
from jaxrlhf.data import prompts
from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.files import UserError, read_records

Record = dict[str, str]
Place = Callable[[str], str]  # from a question to its split: "train", "id", "ood_..." or "" for none

NOTES: tuple[str, ...] = (
    "empty_outputs",  # demonstrations passed over
    "draws",  # pairs passed over
    "missing_verdicts",  # pairs passed over
    "empty_answers_in_pairs",  # kept
    "without_reference",  # evaluation prompts, kept
    "ood_prompts_trained_on",  # tasks of `ood_files` passed over
    "texts_with_lone_surrogates",  # kept, each lone surrogate as U+FFFD
)


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
    """The files behind each key, in order; `UserError` that names the key where nothing is found."""
    return {
        "demonstrations": _glob(c.root, "demonstrations", c.demonstrations),
        "annotations": _glob(c.root, "annotations", c.annotations),
        "reference": _glob(c.root, "reference", [c.reference]),
        "ood_files": [path for _, found in _ood_files(c) for path in found],
    }


def read(c: Files, seed: int, tokenizer: Tokenizer | None = None) -> Instructions:
    """Reads every file, checks every record, and puts each question on one side of the held-out line for good.

    Args:
      c: which files, and the prompt's format.
      seed: of the line and of `evaluation_prompts`.
      tokenizer: whose chat template the format `chat` means.

    Raises:
      UserError: a key leads to no file, a file does not parse, a record lacks a field, or a split stays empty.
    """
    _check(c)
    form = prompts.prompts(c.prompt, tokenizer)
    files, notes = paths(c), Counter(dict.fromkeys(NOTES, 0))
    outputs = [r for p in files["demonstrations"] for r in _asked(p, form, ("output", "dataset"), notes)]
    fields = ("output_1", "output_2", "dataset")
    verdicts = {p: _asked(p, form, fields, notes, ("preference",)) for p in files["annotations"]}
    place = _placer(c, seed, [*outputs, *(r for rows in verdicts.values() for r in rows)])
    demonstrations: dict[str, list[Record]] = {"train": [], "id": []}
    for i, r in enumerate(outputs):
        where = place(r["question"])
        if where in demonstrations and r["output"].strip():
            demonstrations[where].append(_record(form, f"demonstration-{i}", r, r["output"]))
        elif where in demonstrations:
            notes["empty_outputs"] += 1
    asked: dict[str, dict[str, Record]] = {}
    for r in outputs:
        asked.setdefault(place(r["question"]), {}).setdefault(r["question"], r)
    return Instructions(
        demonstrations=_nonempty("demonstrations", demonstrations["train"]),
        validation=_nonempty("held-out demonstrations", demonstrations["id"]),
        preferences=_preferences(c, form, verdicts, place, notes),
        ppo_prompts=[_record(form, f"ppo-{i}", r, "") for i, r in enumerate(asked["train"].values())],
        splits=_splits(c, form, seed, files["reference"], asked, notes),
        notes=dict(notes),
    )


def _check(c: Files) -> None:
    if not 0 < c.held_out < 1:
        raise UserError(f"config.files.held_out={c.held_out}: a share between 0 and 1")
    if both := set(c.id_sources) & set(c.ood_sources):
        raise UserError(f"config.files.ood_sources: {sorted(both)[0]!r} is in id_sources too; a source is one or other")
    names = [*c.ood_sources, *(name for name, _ in _ood_files(c))]
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"config.files.ood_sources, ood_files: {name!r} names {times} splits; each needs its own")
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"config.files: {name!r} cannot name a split; letters, digits, _ and - can")


def _ood_files(c: Files) -> list[tuple[str, list[Path]]]:
    """Name and file of each entry of `ood_files`."""
    for entry in c.ood_files:
        if "=" not in entry:
            raise UserError(f"config.files.ood_files: {entry!r} must be name=path")
    entries = [entry.split("=", 1) for entry in c.ood_files]
    return [(name, _glob(c.root, "ood_files", [pattern])) for name, pattern in entries]


def _glob(root: str, key: str, patterns: Sequence[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(root) / m for m in sorted(glob.glob(pattern, root_dir=root or "."))]
        files = [path for path in matches if path.is_file()]
        if not files:
            raise UserError(
                f"config.files.{key}: nothing at {Path(root) / pattern}; set --config.files.root to the data's folder"
            )
        found |= dict.fromkeys(files)
    if not found:
        raise UserError(f"config.files.{key}: names no file")
    return list(found)


def _asked(
    path: Path, form: prompts.Prompts, texts: Sequence[str], notes: Counter[str], other: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The records of a file, each with its `question`: what is asked, in whatever format, tells records apart."""
    records = _records(path, (*texts, *sorted(form.fields)), notes, other)
    return [r | {"question": prompts.question(r) or form.prompt(r)} for r in records]


def _records(path: Path, texts: Sequence[str], notes: Counter[str], other: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a file, in which the fields `texts`, and those of a question, are text that UTF-8 can hold."""
    records = read_records(path, (*texts, *other))
    for i, r in enumerate(records, 1):
        for field in {*texts, *({"instruction", "input"} & r.keys())}:
            r[field] = _text(r[field], f"{path}, record {i}: field {field!r}", notes)
    return records


def _text(value: object, where: str, notes: Counter[str]) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {type(value).__name__}; it must be text")
    # JSON escapes can hold half of a surrogate pair, where some tool cut an answer within an emoji.
    text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    notes["texts_with_lone_surrogates"] += text != value
    return text


def _placer(c: Files, seed: int, records: Iterable[dict[str, Any]]) -> Place:
    """Splits by source; in-distribution questions by their hash. A question in both kinds of source is "id"."""
    sources: dict[str, str] = {}
    for r in records:
        if r["question"] not in sources or r["dataset"] in c.id_sources:
            sources[r["question"]] = r["dataset"]

    def place(question: str) -> str:
        source = sources.get(question)
        if source in c.id_sources:
            return "id" if _share(seed, question) < c.held_out else "train"
        return f"ood_{source}" if source in c.ood_sources else ""

    return place


def _share(seed: int | str, text: str) -> float:
    """A number in [0, 1) that depends on the seed and the text alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8]) / 2**64


def _splits(
    c: Files,
    form: prompts.Prompts,
    seed: int,
    reference: list[Path],
    asked: dict[str, dict[str, Record]],
    notes: Counter[str],
) -> dict[str, list[Record]]:
    """Evaluation prompts with reference answers, "id" first."""
    answers = {r["question"]: r["output"] for p in reference for r in _asked(p, form, ("output",), notes)}
    rows: dict[str, list[Record]] = {}
    for split in ("id", *(f"ood_{source}" for source in c.ood_sources)):
        rows[split] = [r | {"output": answers.get(text, "")} for text, r in asked.get(split, {}).items()]
    for name, found in _ood_files(c):
        tasks = [task for path in found for task in _seed_tasks(path, notes)]
        rows[f"ood_{name}"] = [r for r in tasks if r["question"] not in asked["train"]]
        notes["ood_prompts_trained_on"] += len(tasks) - len(rows[f"ood_{name}"])
    splits = {}
    for split, found in rows.items():
        chosen = _limited(found, c.evaluation_prompts, seed)
        splits[split] = [_record(form, f"{split}-{i}", r, r["output"]) for i, r in enumerate(chosen)]
        if not chosen:
            raise UserError(f"config.files: split {split!r} is empty; no record's `dataset` leads to it")
        notes["without_reference"] += sum(not r["output"] for r in chosen)
    return splits


def _limited(rows: list[Record], at_most: int, seed: int) -> list[Record]:
    """At most so many (0 = all), spread over the files, which are often sorted by source."""
    if not 0 < at_most < len(rows):
        return rows
    ranked = sorted(range(len(rows)), key=lambda i: _share(f"limit {seed}", rows[i]["question"]))
    return [rows[i] for i in sorted(ranked[:at_most])]


def _preferences(
    c: Files, form: prompts.Prompts, verdicts: dict[Path, list[dict[str, Any]]], place: Place, notes: Counter[str]
) -> dict[str, list[Record]]:
    """Pairs of each split; a draw or a missing verdict is no pair, and counted."""
    pairs: dict[str, list[Record]] = {"train": [], "id": [], **{f"ood_{s}": [] for s in c.ood_sources}}
    for path, records in verdicts.items():
        for i, r in enumerate(records, 1):
            where, verdict = place(r["question"]), r["preference"]
            if where not in pairs:
                continue
            if verdict is None:
                notes["missing_verdicts"] += 1
            elif verdict in (0, 1.5):
                notes["draws"] += 1
            elif verdict in (1, 2):
                won, lost = ("output_1", "output_2") if verdict == 1 else ("output_2", "output_1")
                notes["empty_answers_in_pairs"] += sum(not r[side].strip() for side in (won, lost))
                pairs[where].append(_pair(form, f"{path.stem}-{i}", r, r[won], r[lost]))
            else:
                raise UserError(f"{path}, record {i}: preference is {verdict!r}; known are 1, 2, 1.5, 0 and null")
    _nonempty("annotations of training prompts", pairs["train"])
    return {split: found for split, found in pairs.items() if found}


def _seed_tasks(path: Path, notes: Counter[str]) -> list[Record]:
    """Instruction, with its first input where there is one, and the answer."""
    tasks = []
    for i, r in enumerate(_records(path, ("instruction",), notes, ("instances",)), 1):
        where = f"{path}, record {i}: `instances`"
        try:
            given, answer = r["instances"][0]["input"], r["instances"][0]["output"]
        except (IndexError, KeyError, TypeError):
            raise UserError(f"{where} must be a list of {{input, output}}") from None
        given, answer = _text(given, f"{where}, input", notes), _text(answer, f"{where}, output", notes)
        task = {"instruction": r["instruction"], "input": given, "output": answer}
        tasks.append(task | {"question": prompts.question(task)})
    return tasks


def _record(form: prompts.Prompts, name: str, r: Record, response: str) -> Record:
    return {"id": name, "prompt": form.prompt(r), "response": form.response(response) if response else ""}


def _pair(form: prompts.Prompts, name: str, r: Record, chosen: str, rejected: str) -> Record:
    return {
        "id": name,
        "prompt": form.prompt(r),
        "chosen": form.response(chosen),
        "rejected": form.response(rejected),
        "chosen_finished": "1",
        "rejected_finished": "1",
    }


def _nonempty(what: str, records: list[Record]) -> list[Record]:
    if not records:
        raise UserError(f"config.files: there are no {what}; see id_sources and held_out")
    return records
