import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import loop
from jaxrlhf.config import Loop
from jaxrlhf.files import UserError
from jaxrlhf.types import TrainState

TX = optax.adam(0.1)
LOOP = Loop(steps=9, log_every=2, eval_every=0, save_every=3, keep=2)


def start() -> TrainState:
    params = {"w": jnp.arange(3, dtype=jnp.float32)}
    return TrainState(step=jnp.int32(0), params=params, opt_state=TX.init(params), kl_coef=jnp.float32(0.1))


def step(state: TrainState, i: int):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (3,))
    value, grad = jax.value_and_grad(lambda p: jnp.sum((p["w"] - noise) ** 2))(state.params)
    updates, opt_state = TX.update(grad, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, kl_coef=state.kl_coef * 1.01)
    return state, {"loss": value}


def run(directory, step=step, meta=None):
    return loop.run(
        stage="toy", title="toy", directory=directory, loop=LOOP, state=start(), meta=meta or {"frozen": "a"}, step=step
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


def test_a_finished_stage_does_no_more_steps(tmp_path):
    whole = run(tmp_path)

    def never(state, i):
        raise AssertionError("stepped")

    assert same(run(tmp_path, never), whole)


def test_checkpoints_of_another_trunk_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="frozen"):
        run(tmp_path, meta={"frozen": "b"})


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def blows_up(state, i):
        state, metrics = step(state, i)
        return state, {"loss": metrics["loss"] * (jnp.nan if i == 5 else 1)}

    with pytest.raises(FloatingPointError, match="step 6"):
        run(tmp_path, blows_up)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [3]
