"""The report's explorer of samples: a prompt's answers of each policy, with the words that they share marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxrlhf.evaluation.figures import visible
from jaxrlhf.evaluation.ngrams import WORDS
from jaxrlhf.evaluation.samples import Record, Samples
from jaxrlhf.logs import progress

SHARED = 3  # words in a row that another answer has too
PROMPTS, ANSWERS, LETTERS = 100, 16, 20_000  # of a split, of a policy to a prompt, of a text
ROOM = 6_000_000  # letters in all


def embedded(samples: Samples, splits: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of each split with samples, {"name", "total", "prompts"}: its first prompts, as the first policy's file has them.

    A prompt is {"prompt", "reference", "answers": {policy: [[pieces, numbers], …]}}; `pieces` are `pieces`'. Up to
    PROMPTS of each split, fewer of all splits alike where the texts would be more than ROOM; one of each in any case.
    """
    held = {s: {p: found[s] for p, found in samples.items() if found.get(s)} for s in splits}
    held = {s: by_policy for s, by_policy in held.items() if by_policy}
    drawn = {s: _prompts(by_policy) for s, by_policy in held.items()}
    shown: dict[str, list[dict[str, Any]]] = {s: [] for s in drawn}
    room = ROOM
    with progress("laying out samples", PROMPTS, delay=2) as bar:
        for i in range(PROMPTS):
            row = {s: prompt for s, prompts in drawn.items() if (prompt := next(prompts, None))}
            room -= sum(map(_letters, row.values()))
            if i and room < 0:
                break
            for s, prompt in row.items():
                shown[s].append(prompt)
            bar.update()
    totals = {s: len(next(iter(by_policy.values()))) for s, by_policy in held.items()}
    return [{"name": visible(splits[s]), "total": totals[s], "prompts": prompts} for s, prompts in shown.items()]


def pieces(texts: Sequence[str]) -> list[list[str]]:
    """Each text in parts by turns not shared and shared; joined they are the text.

    A word or mark is shared if SHARED of them in a row, it among them, are also in another of the texts.
    """
    if len(texts) < 2:
        return [[t] for t in texts]
    words_T = [list(WORDS.finditer(t)) for t in texts]
    grams_T = [[tuple(w[0] for w in ws[i : i + SHARED]) for i in range(len(ws) - SHARED + 1)] for ws in words_T]
    holders = Counter(g for grams in grams_T for g in set(grams))
    cut = []
    for text, words, grams in zip(texts, words_T, grams_T, strict=True):
        shared = {i + j for i, g in enumerate(grams) if holders[g] > 1 for j in range(SHARED)}
        edges = [0]
        for i in sorted(shared):
            if i - 1 not in shared:
                edges.append(words[i].start())
            if i + 1 not in shared:
                edges.append(words[i].end())
        edges.append(len(text))
        cut.append([text[a:b] for a, b in pairwise(edges)])
    return cut


def _prompts(by_policy: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    by_id = {p: {_key(r): r for r in records} for p, records in by_policy.items()}
    for first in next(iter(by_policy.values())):
        held = {p: known[_key(first)] for p, known in by_id.items() if _key(first) in known}
        reference = first.get("reference")
        yield {
            "prompt": _shown(first["prompt"]),
            "reference": _shown(reference) if isinstance(reference, str) else "",
            "answers": {p: _answers(r) for p, r in held.items()},
        }


def _key(record: Record) -> tuple[str, str]:
    """Runs of other files may call other prompts by the same id."""
    return str(record["id"]), record["prompt"]


def _answers(record: Record) -> list[tuple[list[str], str]]:
    cut = pieces([_shown(t) for t in record["responses"][:ANSWERS]])
    columns = [(name, record[key]) for name, key in (("score", "scores"), ("gold", "gold")) if key in record]
    ended = record.get("finished", [True] * len(record["responses"]))
    said = record.get("verdicts", [""] * len(record["responses"]))
    told = [
        [f"{name} {values[i]:.2f}" for name, values in columns]
        + [said[i]] * bool(said[i])
        + ["cut off"] * (not ended[i])
        for i in range(len(cut))
    ]
    return [(parts, ", ".join(numbers)) for parts, numbers in zip(cut, told, strict=True)]


def _shown(text: str) -> str:
    rest = len(text) - LETTERS
    return visible(text[:LETTERS]) + (f" … the other {rest:,} characters are in the file." if rest > 0 else "")


def _letters(prompt: Mapping[str, Any]) -> int:
    answers = (part for held in prompt["answers"].values() for parts, _ in held for part in parts)
    return len(prompt["prompt"]) + len(prompt["reference"]) + sum(map(len, answers))
