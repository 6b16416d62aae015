"""Batches as a pure function of (seed, step): Grain's random access, so that resuming needs no iterator state.

A prompt that is too long loses its left end, but for the tokenizer's bos; a response its right end and with it the
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np

from jaxrlhf.data import packing
from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.types import CHOSEN, REJECTED, PairBatch, PromptBatch, SftBatch

Record = Mapping[str, str]
Row = tuple[list[int], list[int]]
Batch = TypeVar("Batch", covariant=True)
# Training rows are as long as the longest of their set, rounded up to this: fewer wasted columns, one shape a stage.
# Evaluation rows are as long as a row can be: one shape for all splits, so that nothing is compiled once a split.
WIDTHS = 8


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
    """Batches of B texts, packed into fewer rows: as many at every step, or more where a batch would not fit."""

    items: Any
    batch_size: int
    width: int
    ways: int  # what the number of rows is a multiple of
    usual: int
    collate: Callable[[Sequence[Sequence[Row]]], Any]

    def _packed(self, step: int) -> list[list[Row]]:
        texts = [self.items[step * self.batch_size + b] for b in range(self.batch_size)]
        rows = packing.first_fit([len(p) + len(q) for p, q in texts], self.width)
        # Few sizes, as each is compiled once: an eighth of a batch apart.
        more = self.ways * max(self.batch_size // (8 * self.ways), 1)
        count = self.usual if len(rows) <= self.usual else packing.rounded(len(rows), more, self.batch_size)
        return [[texts[i] for i in row] for row in rows] + [[]] * (count - len(rows))

    def __getitem__(self, step: int) -> Any:
        return _whole(self, step)

    def parts(self, step: int) -> tuple[int, Callable[[Sequence[int]], Any]]:
        packed = self._packed(step)
        return len(packed), lambda rows: self.collate([packed[r] for r in rows])


@dataclass(frozen=True)
class Joined:
    """Batches of equal sizes one after another as one batch."""

    streams: Sequence[Batches]

    def __getitem__(self, step: int) -> Any:
        """All rows of a step."""
        return _whole(self, step)

    def parts(self, step: int) -> tuple[int, Callable[[Sequence[int]], Any]]:
        """The rows of all streams together."""
        counts, makers = zip(*(s.parts(step) for s in self.streams), strict=True)
        each = counts[0]

        def make(rows: Sequence[int]) -> Any:
            chosen = [[r % each for r in rows if r // each == i] for i in range(len(makers))]
            made = [maker(some) for maker, some in zip(makers, chosen, strict=True) if some]
            return jax.tree.map(lambda *x: np.concatenate(x), *made)

        return sum(counts), make


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

    Examples are packed: several share a row where they fit, and see nothing of each other, so that loss and gradient
    are those of a row each. The number of rows is a multiple of `ways`, as is B.
    `weight_BT` is `prompt_weight` on the prompt, 1 on the response and its end-of-text, 0 on padding and on the first
    token. Every epoch visits each example once, in another order; a batch may reach into the next epoch.
    """
    texts = _examples(examples, tokenizer, prompt_length, response_length)
    lengths = [len(p) + len(q) for p, q in texts]
    width = _width(lengths, prompt_length + response_length)
    usual = packing.capacity(lengths, batch_size, width, ways)
    collate = lambda rows: _sft(rows, width, prompt_weight, tokenizer.pad_id)  # noqa: E731
    return _Packed(_endless(texts, seed), batch_size, width, ways, usual, collate)


def eval_sft_batches(
    examples: Sequence[Record], tokenizer: Tokenizer, *, batch_size: int, prompt_length: int, response_length: int
) -> Iterator[tuple[SftBatch, int]]:
    """All examples once, in order, with the number of valid rows of each batch; repeated rows weigh nothing."""
    rows = _examples(examples, tokenizer, prompt_length, response_length)
    for chosen, valid in _in_order(rows, batch_size):
        batch = _sft([[text] for text in chosen], prompt_length + response_length, 0.0, tokenizer.pad_id)
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
    """`batches[step]` is a PairBatch [B, T]: prompt, chosen response, rejected response, padded on the right."""
    rows = _pairs(pairs, tokenizer, prompt_length, response_length)
    width = _width((sum(map(len, row)) for row in rows), prompt_length + 2 * response_length)
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
) -> list[tuple[list[int], list[int], list[int]]]:
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


def _width(lengths: Iterable[int], at_most: int) -> int:
    return min(-(-max(lengths) // WIDTHS) * WIDTHS, at_most)


def _stream(items: Sequence, batch_size: int, seed: int, collate: Callable[[Sequence], Any]) -> Any:
    return _Stream(_endless(items, seed), batch_size, collate)


def _endless(items: Sequence, seed: int) -> Any:
    return grain.MapDataset.source(items).seed(seed).shuffle().repeat(None)


def _in_order(rows: list, batch_size: int) -> Iterator[tuple[list, int]]:
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        yield chosen + [rows[0]] * (batch_size - len(chosen)), len(chosen)


def _sft(rows: Sequence[Sequence[Row]], width: int, prompt_weight: float, pad_id: int) -> SftBatch:
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
    return SftBatch(tokens_BT=tokens_BT, mask_BT=mask_BT, weight_BT=weight_BT)  # pyright: ignore[reportArgumentType]


def _pair_batch(rows: Sequence[tuple[list[int], list[int], list[int]]], width: int, pad_id: int) -> PairBatch:
    tokens_BT, mask_BT = pad([p + chosen + rejected for p, chosen, rejected in rows], width, pad_id)
    for b, (p, chosen, rejected) in enumerate(rows):
        ends = len(p), len(p) + len(chosen), len(p) + len(chosen) + len(rejected)
        mask_BT[b, ends[0] : ends[1]], mask_BT[b, ends[1] : ends[2]] = CHOSEN, REJECTED
    return PairBatch(tokens_BT=tokens_BT, mask_BT=mask_BT)  # pyright: ignore[reportArgumentType]


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
