"""Batches as a pure function of (seed, step): Grain's random access, so that resuming needs no iterator state.

A prompt that is too long loses its left end, but for the tokenizer's bos; a response its right end and with it the
end-of-text token.
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
# Training rows are as long as the longest of their set, rounded up to this: fewer wasted columns, one shape a stage.
# Evaluation rows are as long as a row can be: one shape for all splits, so that nothing is compiled once a split.
WIDTHS = 8


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

    Returns {"truncated": {set: prompts}, "overlong": {set: responses}, "join_mismatch": {set: pairs}}; the last two
    where `fields` are given. A mismatch is a prompt and response that as one text have other ids than apart, which is
    how policies see them.
    """
    found: dict[str, dict[str, int]] = {"truncated": {}}
    if fields:
        found |= {"overlong": {}, "join_mismatch": {}}
    for name, records in sets.items():
        rows = list(records)  # read once: a record is decoded each time that it is asked for
        texts = [r["prompt"] for r in rows]
        prompts = tokenizer.encode_prompts(texts)
        found["truncated"][name] = sum(len(ids) > prompt_length for ids in prompts)
        for field in fields:
            overlong = sum(len(ids) > response_length for ids in _ended(rows, field, tokenizer))
            responses = [r[field] for r in rows]
            apart = [p + q for p, q in zip(prompts, tokenizer.encode_many(responses), strict=True)]
            joined = tokenizer.encode_joined(texts, responses)
            mismatch = sum(a != b for a, b in zip(apart, joined, strict=True))
            for key, count in (("overlong", overlong), ("join_mismatch", mismatch)):
                found[key][name] = found[key].get(name, 0) + count
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
    for chosen, valid in _in_order(rows, batch_size):
        batch = _sft(chosen, prompt_length + response_length, 0.0, tokenizer.pad_id)
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
    width = _width((len(p) + len(q) for pair in rows for p, q in pair), prompt_length + response_length)
    return _stream(rows, batch_size, seed, lambda chosen: _pair_batch(chosen, width, tokenizer.pad_id))


def prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, seed: int
) -> Batches[PromptBatch]:
    """`batches[step]` is a PromptBatch [B, P], padded on the left; `index_B` is the place in `records`."""
    rows = list(enumerate(_prompts(records, tokenizer, prompt_length)))
    width = _width((len(p) for _, p in rows), prompt_length)
    return _stream(rows, batch_size, seed, lambda chosen: _prompt_batch(chosen, width, tokenizer.pad_id))


def eval_prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int
) -> Iterator[tuple[PromptBatch, int]]:
    """All prompts once, in order, with the number of valid rows of each batch."""
    rows = list(enumerate(_prompts(records, tokenizer, prompt_length)))
    for chosen, valid in _in_order(rows, batch_size):
        yield _prompt_batch(chosen, prompt_length, tokenizer.pad_id), valid


def ids(records: Sequence[Record], *, batch_size: int, seed: int) -> Batches[list[str]]:
    """`ids[step]` names the records of that step's training batch, in its order, whatever kind of batch it is."""
    return _stream([r["id"] for r in records], batch_size, seed, list)


def _examples(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int) -> list[Row]:
    found = list(records)
    prompts, responses = _prompts(found, tokenizer, prompt_length), _ended(found, "response", tokenizer)
    return [(p, q[:response_length]) for p, q in zip(prompts, responses, strict=True)]


def _ended(records: Sequence[Record], field: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids with an end-of-text token, but for responses that are known not to have ended by themselves."""
    found = tokenizer.encode_many([r[field] for r in records])
    ends = [[tokenizer.eos_id] if r.get(f"{field}_finished", "1") == "1" else [] for r in records]
    return [ids + end for ids, end in zip(found, ends, strict=True)]


def _pairs(
    records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int
) -> list[tuple[Row, Row]]:
    """Prompt and response of both sides."""
    found = list(records)
    prompts = _prompts(found, tokenizer, prompt_length)
    sides = [
        [(p, q[:response_length]) for p, q in zip(prompts, _ended(found, side, tokenizer), strict=True)]
        for side in ("chosen", "rejected")
    ]
    return list(zip(*sides, strict=True))


def _prompts(records: Iterable[Record], tokenizer: Tokenizer, prompt_length: int) -> list[list[int]]:
    """Ids that fit; what is cut is the left end, after the bos, where there is one."""
    rows = []
    for ids in tokenizer.encode_prompts([r["prompt"] for r in records]):
        kept = list(tokenizer.bos) if tuple(ids[: len(tokenizer.bos)]) == tokenizer.bos else []
        cut = len(ids) - prompt_length
        rows.append((kept + ids[len(kept) + cut :])[:prompt_length] if cut > 0 else ids)
    return rows


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
    tokens_BT, mask_BT = pad([p + q for p, q in rows], width, pad_id)
    weight_BT = np.zeros_like(mask_BT)
    for b, (p, q) in enumerate(rows):
        weight_BT[b, : len(p)] = prompt_weight
        weight_BT[b, len(p) : len(p) + len(q)] = 1
    weight_BT[:, 0] = 0  # nothing comes before the first token to predict it from
    return SftBatch(tokens_BT=tokens_BT, mask_BT=mask_BT, weight_BT=weight_BT)  # pyright: ignore[reportArgumentType]


def _pair_batch(rows: Sequence[tuple[Row, Row]], width: int, pad_id: int) -> PairBatch:
    both = _sft([c for c, _ in rows] + [r for _, r in rows], width, 0.0, pad_id)
    return PairBatch(tokens_BT=both.tokens_BT, mask_BT=both.mask_BT, weight_BT=both.weight_BT)


def _prompt_batch(rows: Sequence[tuple[int, list[int]]], width: int, pad_id: int) -> PromptBatch:
    tokens_BP, mask_BP = pad([p for _, p in rows], width, pad_id, left=True)
    index_B = np.array([i for i, _ in rows], np.int32)
    return PromptBatch(tokens_BP=tokens_BP, mask_BP=mask_BP, index_B=index_B)  # pyright: ignore[reportArgumentType]


def pad(rows: Sequence[list[int]], width: int, pad_id: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int32, and mask, f32, of rows in [B, width]."""
    tokens_BT = np.full((len(rows), width), pad_id, np.int32)
    mask_BT = np.zeros((len(rows), width), np.float32)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BT[b, where], mask_BT[b, where] = row, 1
    return tokens_BT, mask_BT
