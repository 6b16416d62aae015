"""Batches as a pure function of (seed, step): Grain's random access, so that resuming needs no iterator state.

A prompt that is too long loses its left end, a response its right end and with it the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np

from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.types import PairBatch, PromptBatch, SftBatch

Record = Mapping[str, str]
Row = tuple[list[int], list[int]]
Batch = TypeVar("Batch", covariant=True)
WIDTHS = 8  # rows are as long as the longest of their set, rounded up: fewer wasted columns, one shape a set


class Batches(Protocol[Batch]):
    """`batches[step]`, for every step from 0 without end."""

    def __getitem__(self, step: int, /) -> Batch: ...


def cut(
    sets: Mapping[str, Sequence[Record]],
    tokenizer: Tokenizer,
    prompt_length: int,
    response_length: int,
    fields: Sequence[str] = (),
) -> dict[str, dict[str, int]]:
    """Of each set, how many prompts lose their left end to fit, and how many texts of `fields` their right end.

    Returns {"truncated": {set: prompts}, "overlong": {set: responses}}, the second where `fields` are given.
    """
    found = {
        "truncated": {
            k: sum(len(ids) > prompt_length for ids in _encode(r, "prompt", tokenizer)) for k, r in sets.items()
        }
    }
    if fields:
        found["overlong"] = {
            k: sum(len(ids) > response_length for field in fields for ids in _ended(list(r), field, tokenizer))
            for k, r in sets.items()
        }
    return found


def sft_batches(
    examples: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_length: int,
    response_length: int,
    prompt_weight: float,
    seed: int,
) -> Batches[SftBatch]:
    """`batches[step]` is an SftBatch [B, T]: prompt, response and end-of-text, padded on the right.

    `weight_BT` is `prompt_weight` on the prompt, 1 on the response and its end-of-text, 0 on padding and on the first
    token. Every epoch visits each example once, in another order; a batch may reach into the next epoch.
    """
    rows = _examples(examples, tokenizer, prompt_length, response_length)
    width = _width((len(p) + len(q) for p, q in rows), prompt_length + response_length)
    return _stream(rows, batch_size, seed, lambda chosen: _sft(chosen, width, prompt_weight, tokenizer.pad_id))


def eval_sft_batches(
    examples: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[SftBatch, int]]:
    """All examples once, in order, with the number of valid rows of each batch; repeated rows weigh nothing."""
    rows = _examples(examples, tokenizer, prompt_length, response_length)
    width = _width((len(p) + len(q) for p, q in rows), prompt_length + response_length)
    for chosen, valid in _in_order(rows, batch_size):
        batch = _sft(chosen, width, 0.0, tokenizer.pad_id)
        batch.weight_BT[valid:] = 0  # pyright: ignore[reportIndexIssue]
        yield batch, valid


def pair_batches(
    pairs: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_length: int,
    response_length: int,
    seed: int,
) -> Batches[PairBatch]:
    """`batches[step]` is a PairBatch [2B, T]: chosen rows, then rejected ones, padded on the right."""
    rows = _pairs(pairs, tokenizer, prompt_length, response_length)
    width = _width((len(row) for pair in rows for row in pair), prompt_length + response_length)
    return _stream(rows, batch_size, seed, lambda chosen: _pair_batch(chosen, width, tokenizer.pad_id))


def eval_pair_batches(
    pairs: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[PairBatch, int]]:
    """All pairs once, in order, with the number of valid pairs of each batch."""
    rows = _pairs(pairs, tokenizer, prompt_length, response_length)
    width = _width((len(row) for pair in rows for row in pair), prompt_length + response_length)
    for chosen, valid in _in_order(rows, batch_size):
        yield _pair_batch(chosen, width, tokenizer.pad_id), valid


def prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, seed: int
) -> Batches[PromptBatch]:
    """`batches[step]` is a PromptBatch [B, P], padded on the left; `index_B` is the place in `records`."""
    rows = _prompts(records, tokenizer, prompt_length)
    width = _width((len(p) for _, p in rows), prompt_length)
    return _stream(rows, batch_size, seed, lambda chosen: _prompt_batch(chosen, width, tokenizer.pad_id))


def eval_prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int
) -> Iterator[tuple[PromptBatch, int]]:
    """All prompts once, in order, with the number of valid rows of each batch."""
    rows = _prompts(records, tokenizer, prompt_length)
    width = _width((len(p) for _, p in rows), prompt_length)
    for chosen, valid in _in_order(rows, batch_size):
        yield _prompt_batch(chosen, width, tokenizer.pad_id), valid


def _encode(records: Iterable[Record], field: str, tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer.encode_many([r[field] for r in records])


def _examples(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int) -> list[Row]:
    found = list(records)  # read once: a record is decoded each time that it is asked for
    prompts, responses = _encode(found, "prompt", tokenizer), _ended(found, "response", tokenizer)
    return [(p[-prompt_length:], q[:response_length]) for p, q in zip(prompts, responses, strict=True)]


def _ended(records: Sequence[Record], field: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids with an end-of-text token, but for responses that are known not to have ended by themselves."""
    ends = [[tokenizer.eos_id] if r.get(f"{field}_finished", "1") == "1" else [] for r in records]
    return [ids + end for ids, end in zip(_encode(records, field, tokenizer), ends, strict=True)]


def _pairs(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int) -> list[Row]:
    """Prompt and response of both sides."""
    found = list(records)
    prompts = _encode(found, "prompt", tokenizer)
    sides = [
        [p[-prompt_length:] + q[:response_length] for p, q in zip(prompts, _ended(found, side, tokenizer), strict=True)]
        for side in ("chosen", "rejected")
    ]
    return list(zip(*sides, strict=True))


def _prompts(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int) -> list[tuple[int, list[int]]]:
    return [(i, ids[-prompt_length:]) for i, ids in enumerate(_encode(records, "prompt", tokenizer))]


def _width(lengths: Iterable[int], at_most: int) -> int:
    return min(-(-max(lengths) // WIDTHS) * WIDTHS, at_most)


def _stream(rows: list, batch_size: int, seed: int, collate: Callable[[Sequence], Any]) -> Any:
    source = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return source.batch(batch_size, drop_remainder=True, batch_fn=collate)


def _in_order(rows: list, batch_size: int) -> Iterator[tuple[list, int]]:
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield chosen + [rows[0]] * (batch_size - len(chosen)), len(chosen)


def _sft(rows: Sequence[Row], width: int, prompt_weight: float, pad_id: int) -> SftBatch:
    tokens_BT, mask_BT = _pad([p + q for p, q in rows], width, pad_id)
    weight_BT = np.zeros_like(mask_BT)
    for b, (p, q) in enumerate(rows):
        weight_BT[b, : len(p)] = prompt_weight
        weight_BT[b, len(p) : len(p) + len(q)] = 1
    weight_BT[:, 0] = 0  # nothing comes before the first token to predict it from
    return SftBatch(tokens_BT=tokens_BT, mask_BT=mask_BT, weight_BT=weight_BT)  # pyright: ignore[reportArgumentType]


def _pair_batch(rows: Sequence[Row], width: int, pad_id: int) -> PairBatch:
    tokens_BT, mask_BT = _pad([c for c, _ in rows] + [r for _, r in rows], width, pad_id)
    return PairBatch(tokens_BT=tokens_BT, mask_BT=mask_BT)  # pyright: ignore[reportArgumentType]


def _prompt_batch(rows: Sequence[tuple[int, list[int]]], width: int, pad_id: int) -> PromptBatch:
    tokens_BP, mask_BP = _pad([p for _, p in rows], width, pad_id, left=True)
    index_B = np.array([i for i, _ in rows], np.int32)
    return PromptBatch(tokens_BP=tokens_BP, mask_BP=mask_BP, index_B=index_B)  # pyright: ignore[reportArgumentType]


def _pad(rows: Sequence[list[int]], width: int, pad_id: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.full((len(rows), width), pad_id, np.int32)
    mask_BT = np.zeros((len(rows), width), np.float32)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BT[b, where], mask_BT[b, where] = row, 1
    return tokens_BT, mask_BT
