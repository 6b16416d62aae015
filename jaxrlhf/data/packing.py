"""Several texts in a row: how many rows a batch has, and how wide they are, so that there is hardly any padding."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

TRIES = 64  # batches that are packed to see how wide rows have to be
SHARED = 8  # texts to a row, on average, at most
WIDTHS = 8  # what rows' widths are multiples of
# Width of a row at which attention costs as much as all else: 2,500 as measured in SFT at model width 512 on CPUs. It
# is more for wider models, and less where attention waits for memory.
HALF = 2048
PICKED = 5 / 8  # of a row's positions, at most: queries that are picked meet all keys, a whole row's 5/8 of them


def picks(asked: int, width: int) -> bool:
    """Whether a row's last block and output head had better run on `asked` positions than on all."""
    return 0 < asked <= PICKED * width


class Shape(NamedTuple):
    """Of a batch; one with several widths stands for as many."""

    rows: int
    most: int  # texts in a row
    widths: Sequence[int]  # ascending
    asked: int = 0  # tokens in a row that the loss asks for, at most; 0 = any number


def spread(lengths: Sequence[int], rows: int, most: int) -> list[list[int]]:
    """`rows` rows of indices that are about as full: the longest first, each into the emptiest row.

    No row gets more than `most`; `rows * most` is at least the number of lengths. The fullest row has at most 4/3 of
    what it would have in the best arrangement, where `most` does not bind (Graham 1969).
    """
    placed: list[list[int]] = [[] for _ in range(rows)]
    open_rows = [(0, row) for row in range(rows)]
    heapify(open_rows)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled, row = heappop(open_rows)
        placed[row].append(i)
        if len(placed[row]) < most:
            heappush(open_rows, (filled + lengths[i], row))
    return placed


def shapes(lengths: Sequence[int], batch_size: int, ways: int, asked: Sequence[int] = ()) -> list[Shape]:
    """What batches of `batch_size` texts drawn from `lengths` are packed into: the first shape that fits.

    Few, as each is compiled once: four widths, each for about a quarter of all batches, of that number of rows with
    which they cost least; and a row each, for a batch in a hundred. Numbers of rows are multiples of `ways`. The loss
    asks for `asked` of each text's tokens; none given = for any number. Hardly a batch asks for more than its shape
    has.
    """
    rng, sizes = np.random.default_rng(0), np.asarray([lengths, asked or [0] * len(lengths)])
    drawn = [sizes[:, rng.integers(0, len(lengths), batch_size)].tolist() for _ in range(TRIES)]
    numbers = {min(rounded(-(-batch_size // n), ways), batch_size) for n in range(1, SHARED + 1)}
    found = [_shape(drawn, rows, batch_size) for rows in sorted(numbers, reverse=True)]
    best = min(found, key=lambda shape: sum(shape.rows * width * (1 + width / HALF) for width in shape.widths))
    return [best, Shape(batch_size, 1, [rounded(max(lengths), WIDTHS)], rounded(max(asked, default=0), WIDTHS))]


def _shape(drawn: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, batch_size: int) -> Shape:
    most = 1 if rows == batch_size else 2 * -(-batch_size // rows)
    placed = [spread(lengths, rows, most) for lengths, _ in drawn]
    length, asked = (
        sorted(max(sum(of[n][i] for i in row) for row in batch) for of, batch in zip(drawn, placed, strict=True))
        for n in (0, 1)
    )
    widths = [rounded(length[TRIES * q // 4 - 1], WIDTHS) for q in (1, 2, 3, 4)]
    longest = max(max(of[1]) for of in drawn)
    return Shape(rows, most, widths, rounded(min(asked[-1] + WIDTHS, most * longest), WIDTHS))


def rounded(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
