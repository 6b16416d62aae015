"""Anybody's outputs and verdicts, read into one shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrlhf.files import UserError, listed, read_records, write_json

Key = tuple[str, int]  # a prompt, and how often it came before in the same file


@dataclass(frozen=True)
class Answers:
    """One policy's responses to prompts, in the order of its first file."""

    dataset: dict[Key, str]  # "" where the file does not say
    responses: dict[Key, list[str]]


@dataclass(frozen=True)
class Verdict:
    """What a judge said of a policy's response to a prompt, beside the baseline's."""

    path: Path
    key: Key
    won: float  # 1 the policy wins, 0 the baseline, .5 a draw
    text: str | None  # the policy's, as it was judged; None where the file does not say
    baseline: str | None
    generator: str  # what the file calls the policy


def read_named(entries: Sequence[str], flag: str) -> dict[str, list[Path]]:
    """`name=path` entries by name; `UserError` for another form."""
    found: dict[str, list[Path]] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise UserError(f"--{flag} {entry}: must be NAME=FILE")
        found.setdefault(name, []).append(Path(path))
    return found


def read_answers(paths: Sequence[Path], name: str, log: Callable[[str], None]) -> Answers:
    """The files of one policy; several files are several samples of the prompts that all of them answer."""
    files = [_read_file(path, log) for path in paths]
    shared = [key for key in files[0].responses if all(key in f.responses for f in files)]
    if not shared:
        raise UserError(f"--outputs {name}: {', '.join(map(str, paths))} answer no prompt in common")
    lost = len(set().union(*(f.responses for f in files))) - len(shared)
    if lost:
        log(f"{name}: {lost} prompts are not in all of its {len(files)} files and are left out")
    joined = Answers(
        dataset={key: files[0].dataset[key] for key in shared},
        responses={key: [text for f in files for text in f.responses[key]] for key in shared},
    )
    counts = {len(texts) for texts in joined.responses.values()}
    if len(counts) > 1:
        fewest = min(counts)
        log(f"{name}: prompts have {fewest} to {max(counts)} samples; the first {fewest} of each are measured")
        for key, texts in joined.responses.items():
            joined.responses[key] = texts[:fewest]
    return joined


def _read_file(path: Path, log: Callable[[str], None]) -> Answers:
    records = read_records(path)
    if not records:
        raise UserError(f"{path}: holds no record; a record is {{instruction, output}}, or {{prompt, responses}}")
    seen: Counter[str] = Counter()
    answers = Answers({}, {})
    for i, record in enumerate(records, 1):
        prompt, texts = _fields(path, i, record)
        key = _key(path, i, prompt, seen)
        answers.dataset[key] = str(record.get("dataset") or "")
        answers.responses[key] = texts
    if repeats := seen.total() - len(seen):
        log(
            f"{path}: {repeats} of {len(records)} records repeat an earlier one's prompt and count as prompts of their "
            "own; several samples of a prompt go into one record, as a list"
        )
    texts = [t for row in answers.responses.values() for t in row]
    if empty := sum(not t.strip() for t in texts):
        log(f"{path}: {empty} of {len(texts)} answers are empty; they are measured as they are")
    return answers


def _fields(path: Path, i: int, record: dict[str, Any]) -> tuple[Any, list[str]]:
    if "responses" in record:
        prompt, texts = record.get("prompt"), record["responses"]
    else:
        for field in ("instruction", "output"):
            if field not in record:
                raise UserError(
                    f"{path}, record {i}: no field {field!r}; a record is {{instruction, output}}, "
                    "or {prompt, responses}"
                )
        prompt, texts = record["instruction"], record["output"]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{path}, record {i}: the output must be a text or a list of texts")
    return prompt, texts


def export(entries: Sequence[str], reference: str, folder: Path, log: Callable[[str], None]) -> None:
    """Writes outputs as alpaca_eval's `model_outputs.json`, `folder/<name>/` each, the reference as one of them.

    alpaca_eval reads one output a prompt: further samples go to `model_outputs_2.json` and so on. Reading all of a
    folder's files under one name gives the samples back. What is odd in a file is for `evaluate` to say.
    """
    named = read_named(entries, "outputs") | ({"reference": [Path(reference)]} if reference else {})
    for name, paths in named.items():
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise UserError(f"--outputs {name}: a folder is called so; take letters, digits, dot, plus and minus")
        answers = read_answers(paths, name, lambda _: None)
        for i in range(len(next(iter(answers.responses.values())))):
            rows = [
                {"dataset": answers.dataset[key], "instruction": key[0], "output": texts[i], "generator": name}
                for key, texts in answers.responses.items()
            ]
            write_json(folder / name / f"model_outputs{f'_{i + 1}' if i else ''}.json", rows)
        log(f"{folder / name}/model_outputs.json written")


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a file in alpaca_eval's format; a missing one (null) is none. The policy is output_2."""
    seen: Counter[str] = Counter()
    found = []
    for i, record in enumerate(read_records(path, ("instruction", "preference")), 1):
        key = _key(path, i, record["instruction"], seen)
        if record["preference"] is not None:
            text, baseline = (t if isinstance(t := record.get(f"output_{n}"), str) else None for n in (2, 1))
            generator = str(record.get("generator_2") or "")
            found.append(Verdict(path, key, _outcome(path, i, record["preference"]), text, baseline, generator))
    if not found:
        raise UserError(f"{path}: no verdict in it")
    return found


def check(verdicts: Sequence[Verdict], answers: Answers, name: str, log: Callable[[str], None]) -> None:
    """Says of each file of verdicts how many are about other texts or prompts than a policy's own; all count.

    They are not refused: the verdicts that AlpacaEval published for falcon-7b-instruct are about falcon-40b-instruct.

    Raises:
      UserError: of a file, no verdict is about a prompt of the policy.
    """
    for path in dict.fromkeys(v.path for v in verdicts):
        held = [v for v in verdicts if v.path == path]
        mine = [v for v in held if v.key in answers.responses]
        generators = listed(dict.fromkeys(v.generator for v in held if v.generator))
        whose = f"; generator_2 is {generators} there" if generators else ""
        if not mine:
            raise UserError(f"{path}: none of its {len(held):,} verdicts is about a prompt of --outputs {name}{whose}")
        shown = [v for v in mine if v.text is not None]
        others = [v for v in shown if which(v, answers.responses[v.key]) is None]
        if len(held) > len(mine):
            away = f"{len(held) - len(mine):,} of {len(held):,} verdicts"
            log(f"{path}: {away} are about prompts that {name} does not answer; they count over all prompts")
        if others:
            away = f"{len(others):,} of {len(shown):,} verdicts"
            most = "most likely another model's: " if 2 * len(others) > len(shown) else ""
            log(f"{path}: {most}{away} are about other texts than {name}'s{whose}; they count all the same")


def which(verdict: Verdict, responses: Sequence[str]) -> int | None:
    """Which of a policy's responses to the prompt was judged, white space aside; the only one if no text is there."""
    if verdict.text is None:
        return 0 if len(responses) == 1 else None
    judged = verdict.text.split()
    return next((i for i, text in enumerate(responses) if text.split() == judged), None)


def outcomes(verdicts: Iterable[Verdict]) -> dict[Key, float]:
    """Of each prompt with a verdict: 1 the policy wins, 0 the baseline, .5 a draw.

    Several files are verdicts on several samples of the same prompts: a prompt's outcome is their mean, as verdicts on
    one prompt are not independent of each other.
    """
    return _means((v.key, v.won) for v in verdicts)


def longer(verdicts: Iterable[Verdict]) -> dict[Key, float]:
    """By how many characters output_2 is longer than output_1, of each prompt whose verdict comes with both texts.

    The baseline's texts that were judged may be others than those of its file: of the published verdicts against
    text_davinci_003 most are.
    """
    both = ((v.key, v.text, v.baseline) for v in verdicts)
    return _means((key, len(a) - len(b)) for key, a, b in both if a is not None and b is not None)


def _means(values: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    held: dict[Key, list[float]] = {}
    for key, value in values:
        held.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in held.items()}


def _outcome(path: Path, i: int, preference: Any) -> float:
    """AlpacaEval 2's judges also give numbers between 1 and 2: one more than the chance that output_2 is better."""
    number = isinstance(preference, int | float) and not isinstance(preference, bool)
    if not number or not (preference == 0 or 1 <= preference <= 2):
        raise UserError(
            f"{path}, record {i}: preference is {preference!r}; known are 1 (output_1 is better) to 2 (output_2 is), "
            "0 (a draw) and null (no verdict)"
        )
    return 0.5 if preference == 0 else preference - 1.0


def _key(path: Path, i: int, prompt: Any, seen: Counter[str]) -> Key:
    if not isinstance(prompt, str):
        raise UserError(f"{path}, record {i}: the prompt must be a text, found {type(prompt).__name__}")
    seen[prompt] += 1
    return prompt, seen[prompt] - 1
