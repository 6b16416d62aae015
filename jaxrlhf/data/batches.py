"""Batches as a pure function of (seed, step): Grain's random access, so that resuming needs no iterator state.

A prompt that is too long loses its left end, but for the tokenizer's bos; a response its right end and with it the
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grain
import numpy as np

from jaxrlhf.data import packing
from jaxrlhf.data.packing import WIDTHS, rounded
from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.types import CHOSEN, REJECTED, PairBatch, PromptBatch, SftBatch

Record = Mapping[str, str]
Ids = list[int]
Item = tuple[Ids, ...]  # prompt and response; or prompt, chosen response and rejected response
Batch = TypeVar("Batch", covariant=True)


class Batches(Protocol[Batch]):
    """`batches[step]`, for every step from 0 without end.

    `parts(step)` is how many rows it has, and what makes some of them, given in ascending order, alone.
    """

    def __getitem__(self, step: int, /) -> Batch: ...
    def parts(self, step: int, /) -> tuple[int, Callable[[Sequence[int]], Batch]]: ...


@dataclass(frozen=True)
class _Stream:
    """Batches of B items, a row each."""

    items: Any  # shuffled, epoch after epoch: Grain's random access
    batch_size: int
    collate: Callable[[Sequence], Any]

    def __getitem__(self, step: int) -> Any:
        return _whole(self, step)

    def parts(self, step: int) -> tuple[int, Callable[[Sequence[int]], Any]]:
        start = step * self.batch_size
        return self.batch_size, lambda rows: self.collate([self.items[start + r] for r in rows])


@dataclass(frozen=True)
class _Packed:
    """B items of each order, packed into rows; orders one after another, in as many rows of the same width each."""

    orders: Sequence[Any]  # of items
    batch_size: int
    shapes: Sequence[packing.Shape]  # the last fits all batches
    collate: Callable[[Sequence[Sequence[Item]], int, packing.Shape], Any]  # of rows, as wide as given

    def __getitem__(self, step: int) -> Any:
        return _whole(self, step)

    def parts(self, step: int) -> tuple[int, Callable[[Sequence[int]], Any]]:
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        drawn = [[items[i] for i in places] for items in self.orders]
        packed, width, shape = next(fit for shape in self.shapes if (fit := _fitted(drawn, shape)))
        return len(packed), lambda rows: self.collate([packed[r] for r in rows], width, shape)


def _fitted(
    drawn: Sequence[Sequence[Item]], shape: packing.Shape
) -> tuple[list[list[Item]], int, packing.Shape] | None:
    """Rows, their least width, and the shape, with any number asked for where a row has more; None if it fits none."""
    packed = []
    for items in drawn:
        rows = packing.spread([_size(item) for item in items], shape.rows, shape.most)
        packed += [[items[i] for i in row] for row in rows]
    needed = max(sum(map(_size, row)) for row in packed)
    width = next((w for w in shape.widths if w >= needed), None)
    if width is None:
        return None
    more = shape.asked and max(sum(map(_answer, row)) for row in packed) > shape.asked
    return packed, width, shape._replace(asked=0) if more else shape


def _size(item: Item) -> int:
    return sum(map(len, item))


def _answer(item: Item) -> int:
    return len(item[1])


def _whole(stream: Batches, step: int) -> Any:
    count, make = stream.parts(step)
    return make(range(count))


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
    ways: int = 1,
) -> Batches[SftBatch]:
    """`batches[step]` is an SftBatch [rows, T] of B examples: prompt, response and end-of-text, padded on the right.

    Examples are packed: several share a row, and see nothing of each other, so that loss and gradient are those of a
    row each. The number of rows is a multiple of `ways`, as is B.
    `weight_BT` is `prompt_weight` on the prompt, 1 on the response and its end-of-text, 0 on padding and on the first
    token; where prompts weigh nothing, `before_BQ` says what the loss needs. Every epoch visits each example once, in
    another order; a batch may reach into the next epoch.
    """
    texts = _examples(examples, tokenizer, prompt_length, response_length)
    asked = () if prompt_weight else [_answer(text) for text in texts]
    collate = lambda rows, width, shape: _sft(rows, width, prompt_weight, tokenizer.pad_id, shape.asked)  # noqa: E731
    return _packed(texts, batch_size, [seed], ways, collate, asked)


def eval_sft_batches(
    examples: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[SftBatch, int]]:
    """All examples once, in order, with the number of valid rows of each batch; repeated rows weigh nothing."""
    rows = _examples(examples, tokenizer, prompt_length, response_length)
    for chosen, valid in _in_order(rows, batch_size):
        width = prompt_length + response_length
        batch = _sft([[text] for text in chosen], width, 0.0, tokenizer.pad_id, response_length)
        batch.weight_BT[valid:] = 0  # pyright: ignore[reportIndexIssue]
        yield batch, valid


def pair_batches(
    pairs: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    prompt_length: int,
    response_length: int,
    seeds: Sequence[int],
    ways: int = 1,
) -> Batches[PairBatch]:
    """`batches[step]` is a PairBatch [rows, T] of B pairs for each seed, those of one after those of another.

    They are packed and drawn as `sft_batches` has it; no row has pairs of two seeds, and each seed has as many rows.
    """
    items = _pairs(pairs, tokenizer, prompt_length, response_length)
    collate = lambda rows, width, shape: _pair_batch(rows, width, shape.most, tokenizer.pad_id)  # noqa: E731
    return _packed(items, batch_size, seeds, ways, collate)


def prompt_batches(
    records: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, seed: int
) -> Batches[PromptBatch]:
    """`batches[step]` is a PromptBatch [B, P], padded on the left; `index_B` is the place in `records`."""
    rows = list(enumerate(_prompts(records, tokenizer, prompt_length)))
    # As long as the longest: fewer wasted columns, one shape a stage. Evaluation rows are as long as a row can be: one
    # shape for all splits, so that nothing is compiled once a split.
    width = min(rounded(max(len(p) for _, p in rows), WIDTHS), prompt_length)
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


def _examples(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int) -> list[Item]:
    found = list(records)
    prompts, responses = _prompts(found, tokenizer, prompt_length), _ended(found, "response", tokenizer)
    return [(p, q[:response_length]) for p, q in zip(prompts, responses, strict=True)]


def _ended(records: Sequence[Record], field: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids with an end-of-text token, but for responses that are known not to have ended by themselves."""
    found = tokenizer.encode_many([r[field] for r in records])
    ends = [[tokenizer.eos_id] if r.get(f"{field}_finished", "1") == "1" else [] for r in records]
    return [ids + end for ids, end in zip(found, ends, strict=True)]


def _pairs(records: Sequence[Record], tokenizer: Tokenizer, prompt_length: int, response_length: int) -> list[Item]:
    """Prompt, chosen response, rejected response."""
    found = list(records)
    sides = ([q[:response_length] for q in _ended(found, side, tokenizer)] for side in ("chosen", "rejected"))
    return list(zip(_prompts(found, tokenizer, prompt_length), *sides, strict=True))


def _prompts(records: Iterable[Record], tokenizer: Tokenizer, prompt_length: int) -> list[list[int]]:
    """Ids that fit; what is cut is the left end, after the bos, where there is one."""
    rows = []
    for ids in tokenizer.encode_prompts([r["prompt"] for r in records]):
        kept = list(tokenizer.bos) if tuple(ids[: len(tokenizer.bos)]) == tokenizer.bos else []
        cut = len(ids) - prompt_length
        rows.append((kept + ids[len(kept) + cut :])[:prompt_length] if cut > 0 else ids)
    return rows


def _packed(
    items: Sequence[Item],
    batch_size: int,
    seeds: Sequence[int],
    ways: int,
    collate: Callable[..., Any],
    asked: Sequence[int] = (),
) -> Any:
    shapes = packing.shapes([_size(item) for item in items], batch_size, ways, asked)
    return _Packed([_endless(items, seed) for seed in seeds], batch_size, shapes, collate)


def _stream(items: Sequence, batch_size: int, seed: int, collate: Callable[[Sequence], Any]) -> Any:
    return _Stream(_endless(items, seed), batch_size, collate)


def _endless(items: Sequence, seed: int) -> Any:
    return grain.MapDataset.source(items).seed(seed).shuffle().repeat(None)


def _in_order(rows: list, batch_size: int) -> Iterator[tuple[list, int]]:
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield chosen + [rows[0]] * (batch_size - len(chosen)), len(chosen)


def _sft(rows: Sequence[Sequence[Item]], width: int, prompt_weight: float, pad_id: int, asked: int) -> SftBatch:
    tokens_BT, mask_BT = pad([[i for p, q in texts for i in p + q] for texts in rows], width, pad_id)
    weight_BT = np.zeros_like(mask_BT)
    for b, texts in enumerate(rows):
        start = 0
        for number, (p, q) in enumerate(texts, 1):
            answer, end = start + len(p), start + len(p) + len(q)
            mask_BT[b, start:end] = number
            weight_BT[b, start:answer], weight_BT[b, answer:end] = prompt_weight, 1
            weight_BT[b, start : start + 1] = 0  # nothing comes before the first token to predict it from
            start = end
    before_BQ = _before(weight_BT, asked) if packing.picks(asked, width) else None
    return SftBatch(tokens_BT, mask_BT, weight_BT, before_BQ)  # pyright: ignore[reportArgumentType]


def _before(weight_BT: np.ndarray, asked: int) -> np.ndarray:
    """As `SftBatch` has it: the last position is before none."""
    before_BQ = np.full((len(weight_BT), asked), weight_BT.shape[1] - 1, np.int32)
    for before_Q, weight_T in zip(before_BQ, weight_BT, strict=True):
        found = np.flatnonzero(weight_T) - 1
        before_Q[: len(found)] = found
    return before_BQ


def _pair_batch(rows: Sequence[Sequence[Item]], width: int, most: int, pad_id: int) -> PairBatch:
    tokens_BT, mask_BT = pad([[i for item in pairs for ids in item for i in ids] for pairs in rows], width, pad_id)
    ends_BN2, pair_BN = np.zeros((len(rows), most, 2), np.int32), np.zeros((len(rows), most), np.float32)
    for b, pairs in enumerate(rows):
        start, pair_BN[b, : len(pairs)] = 0, 1
        for n, (p, chosen, rejected) in enumerate(pairs):
            begun = start + len(p)
            turn = begun + len(chosen)
            end = turn + len(rejected)
            mask_BT[b, start:begun] = n + 1
            mask_BT[b, begun:turn], mask_BT[b, turn:end] = n + 1 + CHOSEN, n + 1 + REJECTED
            # An empty response is read where its prompt ends.
            ends = turn if chosen else begun, end if rejected else begun
            ends_BN2[b, n] = np.maximum(ends, start + 1) - 1
            start = end
    return PairBatch(tokens_BT=tokens_BT, mask_BT=mask_BT, ends_BN2=ends_BN2, pair_BN=pair_BN)  # pyright: ignore[reportArgumentType]


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
