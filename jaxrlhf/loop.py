"""The host loop, one function for every stage: resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrlhf import checkpoint, compiled, hosts, optim, preemption
from jaxrlhf.config import Loop
from jaxrlhf.files import Failure, Stopped
from jaxrlhf.logs import Log, progress, say
from jaxrlhf.store import CHECKPOINTS, Workdir
from jaxrlhf.types import TrainState

Metrics = Mapping[str, jax.Array | float]
SHOWN_IDS = 8  # of a batch, on the terminal; metrics.jsonl has them all


def run(
    *,
    stage: str,
    title: str,
    directory: Path,
    loop: Loop,
    state: TrainState,
    meta: Mapping[str, Any],
    step: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    ids: Callable[[int], Sequence[str]],
    evaluate: Callable[[TrainState], Metrics] | None = None,
    remote: Workdir | None = None,
) -> TrainState:
    """Runs `loop.steps` steps from the newest checkpoint in `directory`, or from `state`; returns the last state.

    `step(state, i)` must be a function of its arguments alone (its batch and key follow from i), which makes a resumed
    run equal to an uninterrupted one; its metrics hold `optim.left_out`. `ids(i)` names the examples of its batch.
    Metrics are logged as `<stage>/<name>`. Checkpoints lie in `remote`, where there is one.

    Raises:
      Stopped: somebody asked to stop; the step under way was finished and saved.
      Failure: `optim.IN_A_ROW` updates in a row were not finite; what was saved is from before them.
    """
    checkpoints = remote.checkpoints(stage) if remote else directory / CHECKPOINTS
    restored = checkpoint.restore(checkpoints, state, meta)
    state = state if restored is None else restored
    start, skipped = int(state.step), int(state.skipped)
    if restored is not None and start < loop.steps:
        say(f"{title}: resumed at step {start} of {loop.steps}")
    with (
        preemption.notices() as reached,
        checkpoint.saver(checkpoints, loop.keep, meta) as save,
        contextlib.closing(Log(directory, start)) as log,
        progress(title, loop.steps, start) as bar,
    ):
        marked, marked_at = time.monotonic(), start
        unread: list[tuple[int, Metrics]] = []
        stop = False
        for i in range(start, loop.steps):
            state, metrics = step(state, i)
            if i == start:
                compiled.tidy()
            done, last = i + 1, i + 1 == loop.steps
            stop = reached(done)
            logged, saved = last or done % loop.log_every == 0, last or stop or done % loop.save_every == 0
            evaluated = evaluate if last or (logged and loop.eval_every and done % loop.eval_every == 0) else None
            unread.append((done, metrics))
            # Where nothing else waits for a step, it is read when the next one is under way: the device need not wait.
            due = unread if saved or evaluated else unread[:-1]
            for at, seen in due:
                values = _left_out(stage, title, at, seen, skipped, ids)
                skipped = int(seen["skipped"])
                if at == loop.steps or at % loop.log_every == 0:
                    values = {f"{stage}/{k}": float(v) for k, v in seen.items() if k != "in_a_row"} | values
                    if at == done and evaluated:
                        values |= {f"{stage}/{k}": float(v) for k, v in evaluated(state).items()}
                    log.timing(at, time.monotonic() - marked, at - marked_at)
                    marked, marked_at = time.monotonic(), at
                    bar.set_postfix(_brief(stage, values), refresh=False)
                if values:
                    log.metrics(at, values)
                if int(seen["in_a_row"]) >= optim.IN_A_ROW:
                    raise Failure(_hopeless(stage, at, directory))
            unread = unread[len(due) :]
            if saved:
                if remote:
                    remote.send()  # before the checkpoint: a resumed run has the metrics up to it
                save(state)
            bar.update()
            if stop:
                break
    if stop:
        hosts.barrier("the last save")  # a launcher ends all when the first one ends
        raise Stopped(f"stopped at step {int(state.step)} of {loop.steps} of {stage}, saved; the same command goes on")
    return state


def _left_out(
    stage: str, title: str, at: int, seen: Metrics, before: int, ids: Callable[[int], Sequence[str]]
) -> dict[str, Any]:
    """What metrics.jsonl says of a step in which updates were left out, and a warning; nothing of other steps."""
    total = int(seen["skipped"])
    if total == before:
        return {}
    named = list(ids(at - 1))
    shown = ", ".join(json.dumps(n) for n in named[:SHOWN_IDS]) + (", …" if len(named) > SHOWN_IDS else "")
    say(
        f"{title}: step {at}: the loss or a gradient is not finite; {total - before} update(s) left out, "
        f"{total} so far; its batch: {shown}"
    )
    return {f"{stage}/skipped": total, f"{stage}/skipped_ids": named}


def _hopeless(stage: str, at: int, directory: Path) -> str:
    return (
        f"{stage}: at step {at} the loss or a gradient was not finite in {optim.IN_A_ROW} updates in a row; "
        f"{directory / 'metrics.jsonl'} names the examples, {directory / 'checkpoints'} is from before. "
        f"The same command tries again from there; a lower config.{stage}.optim.lr takes another --workdir"
    )


def _brief(stage: str, values: Mapping[str, Any]) -> dict[str, str]:
    shown = ("loss", "accuracy", "score", "gold", "kl")
    return {k: f"{values[f'{stage}/{k}']:.3g}" for k in shown if f"{stage}/{k}" in values}
