import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import optim, sharding
from jaxrlhf.config import Mesh, Optim
from jaxrlhf.types import ActorCritic, ScalarHead, Scorer


def rates(steps, **changes):
    schedule = optim.schedule(Optim(**{"lr": 0.8, **changes}), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.6, 0.4, 0.2, 0]),
        ("cosine", [0.8, 0.4 * (1 + np.sqrt(0.5)), 0.4, 0.4 * (1 - np.sqrt(0.5)), 0]),
    ],
)
def test_schedules_by_hand(kind, expected):
    np.testing.assert_allclose(rates(4, schedule=kind), expected, atol=1e-6)
    # The warm-up comes out of the stage's steps, so that the rate still ends at 0.
    np.testing.assert_allclose(rates(6, schedule=kind, warmup=2), [0, 0.4, *expected], atol=1e-6)


def step(c, grads, params):
    tx = optim.optimizer(c, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def test_the_first_step_of_adam_is_the_rate_in_the_gradients_direction():
    # Both moments are unbiased at once: g / (|g| + eps); a large eps shows the size of the gradient.
    params, grads = {"w": jnp.float32([1.0, 1.0])}, {"w": jnp.float32([3.0, -4.0])}
    c = Optim(lr=0.1, schedule="constant", eps=1.0, clip_norm=0.0)
    np.testing.assert_allclose(step(c, grads, params)["w"], [1 - 0.1 * 3 / 4, 1 + 0.1 * 4 / 5], rtol=1e-5)


def test_gradients_are_clipped_to_the_global_norm():
    # D9: the norm of (3, 4) in two leaves is 5, not the root of the sum of the leaves' norms.
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.float32([3.0]), "b": jnp.float32([4.0])}
    c = Optim(lr=1.0, schedule="constant", eps=1.0, clip_norm=1.0)
    new = step(c, grads, params)
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-5)
    np.testing.assert_allclose(step(Optim(lr=1.0, schedule="constant", eps=1.0, clip_norm=9.0), grads, params)["a"],
                               [-3 / 4], rtol=1e-5)  # fmt: skip


def test_weight_decay_is_decoupled_from_the_gradient():
    params = {"w": jnp.float32([2.0])}
    c = Optim(lr=0.1, schedule="constant", weight_decay=0.5)
    np.testing.assert_allclose(step(c, {"w": jnp.zeros(1)}, params)["w"], [2.0 * (1 - 0.1 * 0.5)], rtol=1e-5)


def test_the_moments_are_f32():
    state = optim.optimizer(Optim(), 10).init({"w": jnp.zeros(3, jnp.float32)})
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2
    assert all(x.dtype == jnp.float32 for x in moments)


@pytest.mark.parametrize(("loss", "gradient"), [(jnp.nan, 0.5), (jnp.inf, 0.5), (1.5, jnp.nan), (-1.5, -jnp.inf)])
def test_an_update_that_is_not_finite_changes_nothing_but_the_counts(loss, gradient):
    tx = optim.optimizer(Optim(lr=0.1, weight_decay=0.5), 10)
    params = {"w_D": jnp.float32([0.25, -3.5]), "b": jnp.float32(1.75)}
    state = optim.new_state(tx, params, sharding.make_mesh(Mesh()))
    good = {"w_D": jnp.float32([-2.5, 0.5]), "b": jnp.float32(0.1)}
    bad = good | {"b": jnp.float32(gradient)}
    update = jax.jit(optim.update, static_argnums=0)
    once, _ = update(tx, jnp.float32(1.5), good, state)
    left, metrics = update(tx, jnp.float32(loss), bad, once)
    kept = [jax.tree.leaves((s.params, s.opt_state)) for s in (once, left)]
    assert all(map(np.array_equal, *kept))
    assert not np.array_equal(once.params["w_D"], params["w_D"])
    assert [int(left.skipped), int(left.in_a_row), int(left.step)] == [1, 1, 0]
    assert np.isfinite(metrics["grad_norm"]) == np.isfinite(gradient)
    # As if it had not been there.
    after, direct = (update(tx, jnp.float32(0.5), good, s)[0] for s in (left, once))
    assert all(map(np.array_equal, *(jax.tree.leaves((s.params, s.opt_state)) for s in (after, direct))))
    assert [int(after.skipped), int(after.in_a_row)] == [1, 0]


def test_after_three_in_a_row_nothing_changes_any_more():
    tx = optim.optimizer(Optim(), 10)
    state = optim.new_state(tx, {"w_D": jnp.float32([0.25, -3.5])}, sharding.make_mesh(Mesh()))
    grads, counts = {"w_D": jnp.float32([-2.5, 0.5])}, []
    start = state.params
    for loss in (jnp.nan, jnp.nan, jnp.nan, 0.5):
        state, _ = optim.update(tx, jnp.float32(loss), grads, state)
        counts.append((int(state.skipped), int(state.in_a_row)))
    assert counts == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert np.array_equal(state.params["w_D"], start["w_D"])


def test_trees_that_are_trained_are_told_apart():
    """JAX compares dataclasses by their children alone, and a cache that takes two for one gives the other's type."""
    head = ScalarHead(w_D=jnp.zeros(3), b=jnp.zeros(()))
    scorer, actor = Scorer(top={"x": jnp.ones(2)}, head=head), ActorCritic(top={"x": jnp.ones(2)}, value=head)
    assert jax.tree.structure(scorer) != jax.tree.structure(actor)
