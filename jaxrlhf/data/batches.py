"""Batches as a pure function of (seed, step): Grain's random access, so that resuming needs no iterator state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.types import PairBatch, PromptBatch, SftBatch

Record = Mapping[str, str]
WIDTHS = 8  # rows are as long as the longest of their set, rounded up: fewer wasted columns, one shape a set


def truncation(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int) -> int:
    """How many prompts lose their left end to fit."""
    return sum(len(tokenizer.encode(r["prompt"])) > prompt_length for r in records)


def sft_batches(
    examples: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_length: int,
    response_length: int,
    prompt_weight: float,
    seed: int,
) -> Any:
    """`batches[step]` is an SftBatch [B, T]: prompt, response and end-of-text, padded on the right."""
    rows = [_example(r, tokenizer, prompt_length, response_length) for r in examples]
    width = _width(len(p) + len(q) for p, q in rows)
    return _stream(rows, batch_size, seed, lambda chosen: _sft(chosen, width, prompt_weight))


def eval_sft_batches(
    examples: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[SftBatch, int]]:
    """All examples once, in order, with the number of valid rows of each batch; repeated rows weigh nothing."""
    rows = [_example(r, tokenizer, prompt_length, response_length) for r in examples]
    width = _width(len(p) + len(q) for p, q in rows)
    for chosen, valid in _in_order(rows, batch_size):
        batch = _sft(chosen, width, 0.0)
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
) -> Any:
    """`batches[step]` is a PairBatch [2B, T]: chosen rows, then rejected ones."""
    rows = [_pair(r, tokenizer, prompt_length, response_length) for r in pairs]
    width = _width(len(row) for pair in rows for row in pair)
    return _stream(rows, batch_size, seed, lambda chosen: _pairs(chosen, width))


def eval_pair_batches(
    pairs: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[PairBatch, int]]:
    """All pairs once, in order, with the number of valid pairs of each batch."""
    rows = [_pair(r, tokenizer, prompt_length, response_length) for r in pairs]
    width = _width(len(row) for pair in rows for row in pair)
    for chosen, valid in _in_order(rows, batch_size):
        yield _pairs(chosen, width), valid


def prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, seed: int
) -> Any:
    """`batches[step]` is a PromptBatch [B, P], padded on the left."""
    rows = _prompts(records, tokenizer, prompt_length)
    width = _width((len(p) for _, p in rows), prompt_length)
    return _stream(rows, batch_size, seed, lambda chosen: _prompt_batch(chosen, width))


def eval_prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int
) -> Iterator[tuple[PromptBatch, int]]:
    """All prompts once, in order, with the number of valid rows of each batch."""
    rows = _prompts(records, tokenizer, prompt_length)
    width = _width((len(p) for _, p in rows), prompt_length)
    for chosen, valid in _in_order(rows, batch_size):
        yield _prompt_batch(chosen, width), valid


def _example(r: Record, tokenizer: Tokenizer, prompt_length: int, response_length: int) -> tuple[list[int], list[int]]:
    response = [*tokenizer.encode(r["response"]), tokenizer.eos_id]
    return tokenizer.encode(r["prompt"])[-prompt_length:], response[:response_length]


def _pair(r: Record, tokenizer: Tokenizer, prompt_length: int, response_length: int) -> tuple[list[int], list[int]]:
    """Prompt and response of both sides; an end-of-text token only where the response ended by itself."""
    prompt = tokenizer.encode(r["prompt"])[-prompt_length:]
    sides = []
    for side in ("chosen", "rejected"):
        end = [tokenizer.eos_id] if r[f"{side}_finished"] == "1" else []
        sides.append(prompt + (tokenizer.encode(r[side]) + end)[:response_length])
    return sides[0], sides[1]


def _prompts(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int) -> list[tuple[int, list[int]]]:
    return [(i, tokenizer.encode(records[i]["prompt"])[-prompt_length:]) for i in range(len(records))]


def _width(lengths: Any, at_most: int | None = None) -> int:
    width = -(-max(lengths) // WIDTHS) * WIDTHS
    return width if at_most is None else min(width, at_most)


def _stream(rows: list, batch_size: int, seed: int, collate: Any) -> Any:
    source = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return source.batch(batch_size, drop_remainder=True, batch_fn=collate)


def _in_order(rows: list, batch_size: int) -> Iterator[tuple[list, int]]:
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield chosen + [rows[0]] * (batch_size - len(chosen)), len(chosen)


def _sft(rows: Sequence, width: int, prompt_weight: float) -> SftBatch:
    tokens_BT, mask_BT = _pad([p + q for p, q in rows], width)
    weight_BT = np.zeros_like(mask_BT)
    for b, (p, q) in enumerate(rows):
        weight_BT[b, : len(p)] = prompt_weight
        weight_BT[b, len(p) : len(p) + len(q)] = 1
    weight_BT[:, 0] = 0  # nothing comes before the first token to predict it from
    return SftBatch(tokens_BT=tokens_BT, mask_BT=mask_BT, weight_BT=weight_BT)  # pyright: ignore[reportArgumentType]


def _pairs(rows: Sequence, width: int) -> PairBatch:
    tokens_BT, mask_BT = _pad([c for c, _ in rows] + [r for _, r in rows], width)
    return PairBatch(tokens_BT=tokens_BT, mask_BT=mask_BT)  # pyright: ignore[reportArgumentType]


def _prompt_batch(rows: Sequence, width: int) -> PromptBatch:
    tokens_BP, mask_BP = _pad([p for _, p in rows], width, left=True)
    index_B = np.array([i for i, _ in rows], np.int32)
    return PromptBatch(tokens_BP=tokens_BP, mask_BP=mask_BP, index_B=index_B)  # pyright: ignore[reportArgumentType]


def _pad(rows: Sequence[Sequence[int]], width: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.zeros((len(rows), width), np.int32)
    mask_BT = np.zeros((len(rows), width), np.float32)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BT[b, where], mask_BT[b, where] = row, 1
    return tokens_BT, mask_BT
