"""Metrics to JSON lines and TensorBoard, timings apart from them, and progress for the one who waits."""

from __future__ import annotations

import io
import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrlhf.files import write_text, writes

SELDOM = 10.0  # seconds between two lines of a bar in a log


def say(line: str) -> None:
    """One line of progress to standard error, above any bar."""
    if writes():
        tqdm.write(line, file=sys.stderr)


def progress(title: str, total: int, done: int = 0, delay: float = 0.0, unit: str = "") -> tqdm:
    """A bar on standard error with the time left; in a log that is no terminal, a line every ten seconds or so.

    With a `delay`, what is done within so many seconds shows no bar, and no bar stays behind; a log's first line then
    comes after the delay. Large numbers of a `unit` are shown in thousands and millions.
    """
    terminal = sys.stderr.isatty()
    lines = _Lines()
    bar = tqdm(
        total=total,
        initial=done,
        desc=title,
        file=sys.stderr if terminal else lines,
        mininterval=0.5 if terminal else delay or SELDOM,
        delay=delay,
        leave=not delay,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        unit=f" {unit}" if unit else "it",
        unit_scale=bool(unit),
        disable=not writes(),
    )
    lines.bar = bar
    return bar


class _Lines(io.TextIOBase):
    """Standard error for a log: each state of a bar on a line of its own, and after the first one seldom."""

    bar: tqdm | None = None

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")
            if self.bar is not None:
                self.bar.mininterval = SELDOM
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class Log:
    """A stage's metrics.jsonl, timings.jsonl and TensorBoard events; a resumed one forgets steps that were lost.

    Of several hosts, host 0 alone writes them.
    """

    def __init__(self, directory: Path, step: int):
        # Imported here: the half that only measures has no use for it.
        from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._metrics, self._timings = directory / "metrics.jsonl", directory / "timings.jsonl"
        for path in (self._metrics, self._timings):
            _forget_after(path, step)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1, write_to_disk=writes())

    def metrics(self, step: int, values: Mapping[str, float | Sequence[str]]) -> None:
        """Appends one line; a number that is not finite is left out rather than written as invalid JSON."""
        names = {k: v for k, v in values.items() if isinstance(v, Sequence)}
        finite = {k: float(v) for k, v in values.items() if not isinstance(v, Sequence) and math.isfinite(v)}
        _append(self._metrics, {"step": step, **finite, **names})
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)

    def timing(self, step: int, seconds: float, steps: int) -> None:
        """Seconds of each of the last `steps` steps, and the most memory that this process has held, in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _append(self._timings, {"step": step, "seconds_per_step": seconds / steps, "peak_memory": peak})

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()


def _append(path: Path, record: Mapping[str, Any]) -> None:
    if not writes():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _forget_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill in the middle of a line
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
