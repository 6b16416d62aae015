"""`jaxrlhf bench`: our side and its peers take turns; one JSON line a piece of work, or a table of all."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple, NoReturn

from jaxrlhf.bench import peers
from jaxrlhf.bench.work import Work
from jaxrlhf.files import Failure, UserError

Run = dict[str, float]  # "seconds" and "cpu_seconds" of one step


class Side(NamedTuple):
    """One of those that take turns."""

    name: str
    process: subprocess.Popen[str]
    complaints: IO[str]


def measure(work: Work, repeats: int, with_peers: bool) -> dict[str, Any]:
    """Medians over `repeats` of one step after a warm-up, ours and each peer's, which take turns.

    `times_as_fast` is the median over the turns of the peer's seconds over ours, with the lowest and the highest turn;
    `cpu_times_as_fast` the same of CPU seconds, which other processes disturb less. Bytes are the most that a side's
    process has held. `not_measured` says why of the peers that are not. A peer with `counted_times` does one part in
    so many of the work, and its seconds are those of all.

    Raises:
      UserError: our side finds the work's config wrong.
      Failure: our side ended early.
    """
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        ours = start("jaxrlhf", _ours(work), {}, stack)
        own = read(ours) or _fail(ours)
        sides = [ours]
        for peer in peers.PEERS[work.step] if with_peers else ():
            if own["device"] != "cpu":
                absent[peer] = "peers run on CPUs alone"
            elif missing := _missing(peers.needs(peer)):
                absent[peer] = f"{missing} is not installed"
            else:
                command = [sys.executable, "-m", "jaxrlhf.bench.peers", peer, str(work)]
                side = start(peer, command, peers.environment(peer), stack)
                if read(side) is None:
                    absent[peer] = _last_words(side)
                else:
                    sides.append(side)
        runs, peaks = take_turns(sides, repeats, absent)
    runs = {name: [{k: v * peers.times(name) for k, v in run.items()} for run in each] for name, each in runs.items()}
    return _summary(work, own, runs, peaks, absent)


def _ours(work: Work) -> list[str]:
    return [sys.executable, "-m", "jaxrlhf.bench.ours", str(work)]


def measure_start(work: Work) -> dict[str, Any]:
    """From a process's start to the end of its first step: with nothing compiled, and again with all that was kept."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(2):
            started, spent = time.perf_counter(), _children_cpu_seconds()
            with ExitStack() as stack:
                ours = start("jaxrlhf", _ours(work), {"JAX_COMPILATION_CACHE_DIR": kept}, stack)
                if read(ours) is None or read(ours) is None:
                    _fail(ours)
                seconds = time.perf_counter() - started
            runs.append({"seconds": seconds, "cpu_seconds": _children_cpu_seconds() - spent})
    first, again = ({k: round(v, 2) for k, v in run.items()} for run in runs)
    return {
        "bench": "start",
        "experiment": work.experiment.name,
        "first": first,
        "again": again,
        "times_sooner": round(runs[0]["seconds"] / runs[1]["seconds"], 2),
        "cpu_times_sooner": round(runs[0]["cpu_seconds"] / runs[1]["cpu_seconds"], 2),
    }


def _children_cpu_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def start(name: str, command: list[str], environment: Mapping[str, str], stack: ExitStack) -> Side:
    """A side's process, which `stack` ends."""
    complaints = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        env={**os.environ, **environment},
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Side(name, process, complaints)


def take_turns(
    sides: Sequence[Side], repeats: int, absent: dict[str, str]
) -> tuple[dict[str, list[Run]], dict[str, float]]:
    """Each side's runs after its warm-up, and its peak memory, by name; `absent` gets peers that ended early.

    Raises:
      UserError, Failure: the first side, which is ours, ended early.
    """
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for turn in range(repeats + 1):
        for side in [s for s in sides if s.name in runs]:
            if (run := read(side, "again\n" if turn else "")) is not None:
                runs[side.name] += [run] if turn else []
            elif side is sides[0]:
                _fail(side)
            else:
                absent[side.name] = _last_words(side)
                del runs[side.name]
    peaks = {s.name: (read(s, "\n") or {}).get("peak_memory", 0.0) for s in sides if s.name in runs}
    return runs, peaks


def read(side: Side, word: str = "") -> dict[str, Any] | None:
    """A side's next line, after the word that it waits for; None where it has ended. What is no JSON is passed over."""
    stdin, stdout = side.process.stdin, side.process.stdout
    assert stdin is not None
    assert stdout is not None
    try:
        stdin.write(word)
        stdin.flush()
    except BrokenPipeError:
        return None
    return next((json.loads(line) for line in stdout if line.startswith("{")), None)


def _missing(packages: Sequence[str]) -> str:
    """The first that is not installed, or ""; none is imported, as that may print and take seconds."""
    for package in packages:
        top, *inner = package.split(".")
        spec = importlib.util.find_spec(top)
        places = (spec.submodule_search_locations or []) if spec else []
        if spec is None or (inner and not any(Path(place, *inner).is_dir() for place in places)):
            return package
    return ""


def _last_words(side: Side) -> str:
    status = side.process.wait()
    side.complaints.seek(0)
    return ([line.strip() for line in side.complaints if line.strip()] or [f"exit status {status}"])[-1]


def _fail(side: Side) -> NoReturn:
    last = _last_words(side)
    if side.process.returncode == 2:
        raise UserError(last.removeprefix("error: "))
    raise Failure(f"the measured process ended: {last}")


def _summary(
    work: Work,
    own: Mapping[str, Any],
    runs: Mapping[str, list[Run]],
    peaks: Mapping[str, float],
    absent: Mapping[str, str],
) -> dict[str, Any]:
    ours = runs["jaxrlhf"]
    return {
        "bench": work.step,
        "title": work.title,
        "experiment": work.experiment.name,
        "freeze_layers": work.experiment.model.freeze_layers,
        "uneven": work.uneven,
        **({"prompt_weight": work.experiment.sft.prompt_weight} if work.step == "sft" else {}),
        "device": own["device"],
        "repeats": len(ours),
        "tokens_per_second": round(work.tokens / median(r["seconds"] for r in ours), 1),
        **_spent(ours),
        "peak_memory": peaks["jaxrlhf"],
        **(_floor(own, ours) if "flops" in own else {}),
        "peers": {
            name: {
                **_spent(theirs),
                "peak_memory": peaks[name],
                "times_as_fast": _ratio(theirs, ours, "seconds"),
                "cpu_times_as_fast": _ratio(theirs, ours, "cpu_seconds"),
                **(
                    {"share_of_memory": round(peaks["jaxrlhf"] / peaks[name], 3)}
                    if peers.times(name) == 1
                    else {"counted_times": peers.times(name)}
                ),
            }
            for name, theirs in runs.items()
            if name != "jaxrlhf"
        },
        "not_measured": dict(absent),
    }


def _floor(own: Mapping[str, Any], ours: Sequence[Run]) -> dict[str, float]:
    # CPU seconds where CPUs compute, as the peak is: other processes disturb them less.
    spent = median(r["cpu_seconds" if own["device"] == "cpu" else "seconds"] for r in ours)
    return {
        "gflop": round(own["flops"] / 1e9, 2),
        "least_gflop": round(own["least_flops"] / 1e9, 2),
        "share_of_floor": round(own["least_flops"] / (spent * own["peak_flops_per_second"]), 3),
    }


def _spent(runs: Sequence[Run]) -> Run:
    return {key: round(median(r[key] for r in runs), 4) for key in ("seconds", "cpu_seconds")}


def _ratio(theirs: Sequence[Run], ours: Sequence[Run], key: str) -> dict[str, float]:
    each = [a[key] / b[key] for a, b in zip(theirs, ours, strict=True)]
    return {"median": round(median(each), 2), "low": round(min(each), 2), "high": round(max(each), 2)}


HEAD = ("step", "frozen", "CPU s", "tokens/s", "peak GB", "GFLOP", "least", "of the floor")
PEER_HEAD = ("peer", "its CPU s", "times as fast", "its peak GB")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """All that was measured, as Markdown: CPU seconds of a step, arithmetic, memory, how many times as fast as a peer.

    GFLOP are those of matrix products in our program, beside the least; "of the floor" is the time that the least would
    take at the rate of a large matrix product over the time taken.
    """
    rows = [[*HEAD, *PEER_HEAD], ["---"] * len(HEAD + PEER_HEAD)]
    for line in found:
        rows += [[*_own_cells(line), *theirs] for theirs in _peer_cells(line)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _own_cells(line: Mapping[str, Any]) -> list[str]:
    cells = [
        line["title"],
        f"{line['freeze_layers']:g}",
        f"{line['cpu_seconds']:.2f}",
        f"{line['tokens_per_second']:.0f}",
        f"{line['peak_memory'] / 1e9:.2f}",
    ]
    if "gflop" not in line:
        return [*cells, "", "", ""]
    return [*cells, f"{line['gflop']:.0f}", f"{line['least_gflop']:.0f}", f"{line['share_of_floor']:.0%}"]


def _peer_cells(line: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, peer in line["peers"].items():
        ratio = peer["cpu_times_as_fast"]
        shown = f"**{ratio['median']:.1f}** ({ratio['low']:.1f} to {ratio['high']:.1f})"
        counted = f", 1 in {peer['counted_times']:g} done" if "counted_times" in peer else ""
        yield [name + counted, f"{peer['cpu_seconds']:.2f}", shown, f"{peer['peak_memory'] / 1e9:.2f}"]
    for name, why in line["not_measured"].items():
        yield [name, why.replace("|", "/"), "", ""]
    if not line["peers"] and not line["not_measured"]:
        yield [""] * len(PEER_HEAD)


def start_line(found: Mapping[str, Any]) -> str:
    """What `measure_start` found, in a sentence."""
    first, again = found["first"], found["again"]
    return (
        f"From a process's start to the end of its first PPO iteration: {first['seconds']:.0f} s "
        f"({first['cpu_seconds']:.0f} CPU s) with nothing compiled, {again['seconds']:.0f} s "
        f"({again['cpu_seconds']:.0f}) the second time: {found['times_sooner']:.1f} times sooner."
    )
