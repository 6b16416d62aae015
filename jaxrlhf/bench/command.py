"""`jaxrlhf bench`: our side and its peers take turns; one JSON line a piece of work, or a table of all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import IO, Any, NamedTuple

from jaxrlhf.bench import peers
from jaxrlhf.bench.work import Work
from jaxrlhf.files import Failure, UserError
from jaxrlhf.logs import say

Run = dict[str, float]  # "seconds" and "cpu_seconds" of one step


class Side(NamedTuple):
    """One of those that take turns."""

    name: str
    process: subprocess.Popen[str]
    complaints: IO[str]


def measure(work: Work, repeats: int, with_peers: bool) -> dict[str, Any]:
    """Medians over `repeats` of one step after a warm-up, ours and each installed peer's, which take turns.

    `times_as_fast` is the median over the turns of the peer's seconds over ours, with the lowest and the highest turn;
    `cpu_times_as_fast` the same of CPU seconds, which other processes disturb less. Bytes are the most that a side's
    process has held. A peer that fails is left out, with a line to standard error.

    Raises:
      UserError: our side finds the work's config wrong.
    """
    with ExitStack() as stack:
        sides = [_start("jaxrlhf", _ours(work), {}, stack)]
        for peer in peers.PEERS[work.step] if with_peers else ():
            if missing := _missing(peers.needs(peer)):
                say(f"{work.step}: {peer} is not measured, as {missing} is not installed")
                continue
            environment = peers.ALLOCATOR if peer != "generate" else {}
            sides.append(_start(peer, _peer(peer, work), environment, stack))
        runs: dict[str, list[Run]] = {side.name: [] for side in sides}
        for turn in range(repeats + 1):
            for side in [s for s in sides if s.name in runs]:
                if (run := _turn(side, turn)) is None:
                    _give_up(side)
                    del runs[side.name]
                elif turn:
                    runs[side.name].append(run)
        facts = {side.name: _facts(side) for side in sides if side.name in runs}
    return _summary(work, runs, facts)


def _ours(work: Work) -> list[str]:
    return [sys.executable, "-m", "jaxrlhf.bench.ours", str(work)]


def _peer(peer: str, work: Work) -> list[str]:
    return [sys.executable, "-m", "jaxrlhf.bench.peers", peer, str(work)]


def _missing(modules: Sequence[str]) -> str:
    for module in modules:
        try:
            if importlib.util.find_spec(module) is None:
                return module
        except ModuleNotFoundError:
            return module
    return ""


def _start(name: str, command: list[str], environment: Mapping[str, str], stack: ExitStack) -> Side:
    complaints = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))  # noqa: SIM115
    process = stack.enter_context(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, **environment},
        )
    )
    stack.callback(process.kill)
    return Side(name, process, complaints)


def _turn(side: Side, turn: int) -> Run | None:
    """One step; the first is the warm-up, which a side begins by itself. None where the side has ended."""
    stdin, stdout = side.process.stdin, side.process.stdout
    assert stdin is not None
    assert stdout is not None
    if turn:
        stdin.write("again\n")
        stdin.flush()
    line = stdout.readline()
    return json.loads(line) if line else None


def _facts(side: Side) -> dict[str, Any]:
    assert side.process.stdin is not None
    assert side.process.stdout is not None
    side.process.stdin.close()
    return json.loads(side.process.stdout.readline())


def _give_up(side: Side) -> None:
    """What is known of a side that ended early: ours must not, a peer may."""
    status = side.process.wait()
    side.complaints.seek(0)
    last = ([line.strip() for line in side.complaints if line.strip()] or [f"exit status {status}"])[-1]
    if side.name != "jaxrlhf":
        say(f"{side.name} is not measured: {last}")
    elif status == 2:
        raise UserError(last.removeprefix("error: "))
    else:
        raise Failure(f"the measured process ended: {last}")


def _summary(work: Work, runs: Mapping[str, list[Run]], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ours, own = runs["jaxrlhf"], facts["jaxrlhf"]
    seconds = median(r["seconds"] for r in ours)
    # CPU seconds where CPUs compute, as the peak is: other processes disturb them less.
    spent = median(r["cpu_seconds" if own["device"] == "cpu" else "seconds"] for r in ours)
    return {
        "bench": work.step,
        "experiment": work.experiment.name,
        "freeze_layers": work.experiment.model.freeze_layers,
        "device": own["device"],
        "repeats": len(ours),
        "tokens_per_second": round(work.tokens / seconds, 1),
        **_spent(ours),
        "peak_memory": own["peak_memory"],
        "gflop": round(own["flops"] / 1e9, 2),
        "least_gflop": round(own["least_flops"] / 1e9, 2),
        "share_of_floor": round(own["least_flops"] / (spent * own["peak_flops_per_second"]), 3),
        "peers": {
            name: {
                **_spent(theirs),
                "peak_memory": facts[name]["peak_memory"],
                "times_as_fast": _ratio(theirs, ours, "seconds"),
                "cpu_times_as_fast": _ratio(theirs, ours, "cpu_seconds"),
                "share_of_memory": round(own["peak_memory"] / facts[name]["peak_memory"], 3),
            }
            for name, theirs in runs.items()
            if name != "jaxrlhf"
        },
    }


def _spent(runs: Sequence[Run]) -> Run:
    return {key: round(median(r[key] for r in runs), 4) for key in ("seconds", "cpu_seconds")}


def _ratio(theirs: Sequence[Run], ours: Sequence[Run], key: str) -> dict[str, float]:
    each = [a[key] / b[key] for a, b in zip(theirs, ours, strict=True)]
    return {"median": round(median(each), 2), "low": round(min(each), 2), "high": round(max(each), 2)}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """All that was measured, as Markdown: CPU seconds of a step, memory, and how many times as fast as each peer."""
    head = [
        "step",
        "frozen",
        "CPU s",
        "tokens/s",
        "peak GB",
        "of the floor",
        "peer",
        "its CPU s",
        "times as fast",
        "GB",
    ]
    rows = [head, ["---"] * len(head)]
    for line in found:
        rows += _rows(line)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _rows(line: Mapping[str, Any]) -> Iterator[list[str]]:
    own = [
        f"{line['bench']}, {line['experiment']}",
        f"{line['freeze_layers']:g}",
        f"{line['cpu_seconds']:.2f}",
        f"{line['tokens_per_second']:.0f}",
        f"{line['peak_memory'] / 1e9:.2f}",
        f"{line['share_of_floor']:.0%}",
    ]
    if not line["peers"]:
        yield [*own, "", "", "", ""]
    for name, peer in line["peers"].items():
        ratio = peer["cpu_times_as_fast"]
        shown = f"**{ratio['median']:.1f}** ({ratio['low']:.1f} to {ratio['high']:.1f})"
        yield [*own, name, f"{peer['cpu_seconds']:.2f}", shown, f"{peer['peak_memory'] / 1e9:.2f}"]
