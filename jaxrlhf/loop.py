"""The host loop, one function for every stage: resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrlhf import checkpoint
from jaxrlhf.config import Loop
from jaxrlhf.logs import Log, progress, say
from jaxrlhf.types import TrainState

Metrics = Mapping[str, jax.Array | float]


def run(
    *,
    stage: str,
    title: str,
    directory: Path,
    loop: Loop,
    state: TrainState,
    meta: Mapping[str, str],
    step: Callable[[TrainState, int], tuple[TrainState, Metrics]],
    evaluate: Callable[[TrainState], Metrics] | None = None,
) -> TrainState:
    """Runs `loop.steps` steps from the newest checkpoint in `directory`, or from `state`; returns the last state.

    `step(state, i)` must be a function of its arguments alone (its batch and key follow from i), which makes a resumed
    run equal to an uninterrupted one. Metrics are logged as `<stage>/<name>`. A loss that is not finite stops the run
    before it is saved.
    """
    with checkpoint.open_manager(directory / "checkpoints", loop.keep) as manager:
        restored = checkpoint.restore(manager, state, meta)
        state = state if restored is None else restored
        start = int(state.step)
        if restored is not None and start < loop.steps:
            say(f"{title}: resumed at step {start} of {loop.steps}")
        log = Log(directory, start)
        bar = progress(title, loop.steps, start)
        marked, marked_at = time.monotonic(), start
        for i in range(start, loop.steps):
            state, metrics = step(state, i)
            done, last = i + 1, i + 1 == loop.steps
            if last or done % loop.log_every == 0:
                values = {f"{stage}/{k}": float(v) for k, v in metrics.items()}
                if evaluate and (last or (loop.eval_every and done % loop.eval_every == 0)):
                    values |= {f"{stage}/{k}": float(v) for k, v in evaluate(state).items()}
                if not jnp.isfinite(values[f"{stage}/loss"]):
                    raise FloatingPointError(
                        f"{stage}: the loss is {values[f'{stage}/loss']} at step {done}; lower lr?"
                    )
                log.metrics(done, values)
                log.timing(done, time.monotonic() - marked, done - marked_at)
                marked, marked_at = time.monotonic(), done
                bar.set_postfix(_brief(stage, values), refresh=False)
            if last or done % loop.save_every == 0:
                checkpoint.save(manager, state, meta)
            bar.update()
        bar.close()
        log.close()
        manager.wait_until_finished()
    return state


def _brief(stage: str, values: Mapping[str, float]) -> dict[str, str]:
    shown = ("loss", "accuracy", "score", "gold", "kl")
    return {k: f"{values[f'{stage}/{k}']:.3g}" for k in shown if f"{stage}/{k}" in values}
