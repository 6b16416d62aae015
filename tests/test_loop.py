import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import checkpoint, loop, optim, sharding
from jaxrlhf.config import Loop, Mesh
from jaxrlhf.files import Failure, Stopped, UserError
from jaxrlhf.types import TrainState

TX = optax.adam(0.1)
LOOP = Loop(steps=9, log_every=2, eval_every=0, save_every=3, keep=2)


@pytest.fixture(autouse=True)
def _listening():
    """What is started in the background of a script, as these tests may be, ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start() -> TrainState:
    params = {"w_D": jnp.arange(3, dtype=jnp.float32)}
    return optim.new_state(TX, params, sharding.make_mesh(Mesh()), kl_coef=jnp.float32(0.1))


def step(state: TrainState, i: int):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (3,))
    value, grad = jax.value_and_grad(lambda p: jnp.sum((p["w_D"] - noise) ** 2))(state.params)
    state, _ = optim.update(TX, value, grad, state)
    state = state.replace(step=state.step + 1, kl_coef=state.kl_coef * 1.01)
    return state, {"loss": value} | optim.left_out(state)


def run(directory, step=step, meta=None, evaluate=None, settings=LOOP):
    return loop.run(
        stage="toy",
        title="toy",
        directory=directory,
        loop=settings,
        state=start(),
        meta=meta or {"frozen": "a"},
        step=step,
        ids=lambda i: [f"post-{i}", "a\nb"],
        evaluate=evaluate,
    )


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, killed_at):
    whole = run(tmp_path / "whole")

    def dies(state, i):
        if i == killed_at:
            raise KeyboardInterrupt
        return step(state, i)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", dies)
    assert same(run(tmp_path / "killed"), whole)
    lines = [(tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == [2, 4, 6, 8, 9]


class Watched:
    """A metric that notes when it is read."""

    def __init__(self, value, name, seen):
        self.value, self.name, self.seen = value, name, seen

    def __float__(self):
        self.seen.append(self.name)
        return float(self.value)


def test_metrics_are_read_when_the_next_step_is_under_way(tmp_path):
    """Steps 2, 4, 6, 8, 9 are logged, 3, 6, 9 saved, 4, 8, 9 evaluated: what nothing waits for is read a step late."""
    seen = []

    def watched(state, i):
        state, metrics = step(state, i)
        seen.append(f"step {i + 1}")
        return state, metrics | {"loss": Watched(metrics["loss"], f"read {i + 1}", seen)}

    def evaluate(state):
        seen.append(f"evaluate {int(state.step)}")
        return {"x": 0.5}

    run(tmp_path, watched, evaluate=evaluate, settings=replace(LOOP, eval_every=4))
    assert ", ".join(seen) == (
        "step 1, step 2, step 3, read 2, step 4, read 4, evaluate 4, step 5, step 6, read 6, "
        "step 7, step 8, read 8, evaluate 8, step 9, read 9, evaluate 9"
    )
    assert [(line["step"], "toy/x" in line) for line in lines_of(tmp_path)] == [
        (2, False), (4, True), (6, False), (8, True), (9, True),
    ]  # fmt: skip
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timings] == [2, 4, 6, 8, 9]


def test_a_finished_stage_does_no_more_steps(tmp_path):
    whole = run(tmp_path)

    def never(state, i):
        raise AssertionError("stepped")

    assert same(run(tmp_path, never), whole)


def test_checkpoints_of_another_trunk_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="frozen"):
        run(tmp_path, meta={"frozen": "b"})


def poisoned(*bad):
    """`step`, with a loss and gradient that are not finite at these steps."""

    def bad_step(state, i):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (3,)) + (jnp.inf if i in bad else 0)
        value, grad = jax.value_and_grad(lambda p: jnp.sum((p["w_D"] - noise) ** 2))(state.params)
        state, _ = optim.update(TX, value, grad, state)
        return state.replace(step=state.step + 1), {"loss": value} | optim.left_out(state)

    return bad_step


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_updates_that_are_not_finite_are_left_out_and_named(tmp_path, capsys):
    state = run(tmp_path / "some", poisoned(0, 4, 5, 8))
    lines = lines_of(tmp_path / "some")
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6, 8, 9]
    assert [line["toy/skipped"] for line in lines] == [1, 1, 1, 2, 3, 3, 4]
    assert lines[3] == {"step": 5, "toy/skipped": 2.0, "toy/skipped_ids": ["post-4", "a\nb"]}
    assert ["toy/loss" in line for line in lines] == [False, True, True, False, False, True, False]
    assert (int(state.skipped), int(state.in_a_row), int(state.opt_state[0].count)) == (4, 1, 5)
    error = capsys.readouterr().err
    assert (
        'step 5: the loss or a gradient is not finite; 1 update(s) left out, 2 so far; its batch: "post-4", "a' in error
    )
    assert "a\nb" not in error  # what a file calls its examples cannot write lines of its own


def test_three_in_a_row_stop_the_run_with_a_checkpoint_from_before(tmp_path):
    start_of = {}

    def watched(state, i):
        start_of[i] = jax.device_get(state)
        return poisoned(4, 5, 6)(state, i)

    with pytest.raises(Failure, match="3 updates in a row"):
        run(tmp_path, watched)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()].count("6") == 1
    saved = checkpoint.restore(tmp_path / "checkpoints", start(), {"frozen": "a"})
    assert saved is not None
    assert int(saved.in_a_row) == 2
    assert same(saved.params, start_of[4].params)
    assert same(saved.opt_state, start_of[4].opt_state)
    with pytest.raises(Failure, match="at step 7"):  # the same again: the count was saved too
        run(tmp_path, poisoned(4, 5, 6))
    assert int(run(tmp_path, poisoned()).skipped) == 2


def test_a_request_to_stop_saves_the_step_under_way_and_loses_nothing(tmp_path):
    whole = run(tmp_path / "whole")
    for number, at in ((signal.SIGTERM, 0), (signal.SIGINT, 3), (signal.SIGTERM, 4), (signal.SIGINT, 8)):

        def asks(state, i, number=number, at=at):
            if i == at:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            return step(state, i)

        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(Stopped, match=f"stopped at step {at + 1} of 9 of toy, saved; the same command goes on"):
            run(tmp_path / "asked", asks)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert same(run(tmp_path / "asked"), whole)
    assert (tmp_path / "asked" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_a_request_after_the_last_step_is_not_forgotten(tmp_path):
    def asks(state):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return {"x": 0.5}

    with pytest.raises(Stopped, match="saved; the same command goes on"):
        run(tmp_path, evaluate=asks)
    assert int(run(tmp_path).step) == 9
    assert lines_of(tmp_path)[-1]["toy/x"] == 0.5


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    code = """if True:
        import os, signal, time
        from jaxrlhf import preemption
        with preemption.notices() as reached:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
            assert reached(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
            """
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "stopped at once; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_where_processes_work_together_jax_names_the_step(tmp_path, number):
    code = f"""if True:
        import os, signal, socket, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import jax
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = "localhost:%d" % free.getsockname()[1]
        jax.distributed.initialize(address, num_processes=1, process_id=0)
        from pathlib import Path
        import test_loop
        from jaxrlhf.files import Stopped
        def step(state, i):
            if i == 2:
                os.kill(os.getpid(), signal.{number})
            time.sleep(0.3)
            return test_loop.step(state, i)
        try:
            test_loop.run(Path({str(tmp_path)!r}), step)
        except Stopped as stopped:
            print(stopped)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"stopped at step [3-8] of 9 of toy, saved; the same command goes on\n", done.stdout)
    stopped_at = done.stdout.split()[3]
    assert (tmp_path / "checkpoints" / stopped_at / "SHA256SUMS").exists()
