"""Several texts in a row: which ones go together, so that a batch has fewer rows and hardly any padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TRIES = 64  # batches that are packed to see how many rows one needs


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of indices whose lengths fit into `width` together: the longest first, each into the first row with room.

    No length is above `width`. First fit in falling order takes at most 11/9 of the fewest rows, and one (Dósa 2007).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def capacity(lengths: Sequence[int], batch_size: int, width: int, ways: int) -> int:
    """Rows that three of four batches of `batch_size` texts drawn from `lengths` fit into, a multiple of `ways`."""
    rng, drawn = np.random.default_rng(0), np.asarray(lengths)
    needed = sorted(len(first_fit(rng.choice(drawn, batch_size).tolist(), width)) for _ in range(TRIES))
    return rounded(needed[3 * TRIES // 4], ways, batch_size)


def rounded(rows: int, step: int, at_most: int) -> int:
    """The next multiple of `step`, or `at_most`."""
    return min(-(-rows // step) * step, at_most)
