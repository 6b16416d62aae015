"""PPO's scoring in parts, and its update on rollouts that hold numbers that are not finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import model, optim, ppo, rollouts, sharding
from jaxrlhf.config import Experiment, Mesh, Model, Optim, Ppo
from jaxrlhf.experiment import architecture
from jaxrlhf.split import split
from jaxrlhf.types import ActorCritic, Fixed, PpoRollout, PromptBatch, Sample, ScalarHead, Scorer

C = Ppo(batch_size=6, epochs=2, minibatches=3, kl_target=0.75, kl_horizon=12)
TX = optim.optimizer(Optim(lr=0.01), 6)


@pytest.fixture(scope="module")
def start():
    """The arguments of an update: an untrained policy, and a rollout of 6 prompts of up to 4 tokens."""
    sizes = Model(layers=2, width=8, heads=2, ff_width=12, prompt_length=4, response_length=3, freeze_layers=0.5)
    arch = architecture(Experiment(model=sizes), 11)
    frozen, top = split(model.init(arch, jax.random.key(0)), 0.5)
    rng = np.random.default_rng(0)
    token_BT = jnp.asarray(rng.integers(2, 11, (6, 7)), jnp.int32)
    mask_BT = jnp.ones((6, 7), jnp.float32).at[1, 0].set(0).at[2, -1].set(0)
    numbers = {k: jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for k in ("logp", "ref_logp", "value", "return")}
    rollout = PpoRollout(
        tokens_BT=token_BT,
        mask_BT=mask_BT,
        response_mask_BR=mask_BT[:, -3:],
        hidden_BTD=model.trunk(arch, frozen, token_BT, mask_BT),
        logp_BR=numbers["logp"],
        ref_logp_BR=numbers["ref_logp"],
        value_BR=numbers["value"],
        score_B=jnp.zeros(6, jnp.float32),
        advantage_BR=numbers["return"] - numbers["value"],
        return_BR=numbers["return"],
    )
    value = ScalarHead(w_D=jnp.zeros(8, jnp.float32), b=jnp.zeros((), jnp.float32))
    return arch, frozen, ActorCritic(top=top, value=value), rollout


def update(start, rollout):
    arch, frozen, policy, _ = start
    fixed = Fixed(frozen=frozen, ref=policy.top, scorer=None)
    state = optim.new_state(TX, policy, sharding.make_mesh(Mesh()), kl_coef=jnp.float32(0.05))
    state, metrics = ppo.update(arch, TX, C, state, fixed, rollout, jax.random.key(1))
    return jax.device_get(state), metrics


def test_a_bad_response_leaves_out_its_minibatch_of_each_epoch(start):
    rollout = start[3]
    whole, _ = update(start, rollout)
    assert (int(whole.step), int(whole.skipped), int(whole.opt_state[1][0].count)) == (1, 0, 6)
    bad, metrics = update(start, rollout.replace(return_BR=rollout.return_BR.at[4].set(jnp.nan)))
    assert (int(bad.step), int(bad.skipped), int(bad.opt_state[1][0].count)) == (1, 2, 4)
    assert int(metrics["skipped"]) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(bad))
    assert not np.array_equal(bad.params.value.w_D, start[2].value.w_D)
    assert np.float32(bad.kl_coef) == np.float32(whole.kl_coef) != np.float32(0.05)


def test_a_rollout_that_is_bad_throughout_changes_no_parameter_and_no_coefficient(start):
    rollout = start[3]
    nothing = jnp.full((6, 3), jnp.nan, jnp.float32)
    state, metrics = update(start, rollout.replace(advantage_BR=nothing, ref_logp_BR=nothing))
    assert all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(start[2])))
    assert (int(state.step), int(state.skipped), int(metrics["in_a_row"])) == (1, 6, 6)
    assert np.float32(state.kl_coef) == np.float32(0.05)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("freeze_layers", [0.5, 0.0])
def test_a_rollout_read_in_parts_is_the_whole_rollout(start, freeze_layers, elsewhere):
    """In one part, and in three minibatches of two parts each: every number of every row, in its order."""
    arch, _, _, seen = start
    frozen, top = split(model.init(arch, jax.random.key(0)), freeze_layers)
    rng, other = np.random.default_rng(3), split(model.init(arch, jax.random.key(5)), freeze_layers)[1]
    head = ScalarHead(w_D=jnp.asarray(rng.normal(size=8), jnp.float32), b=jnp.float32(0.3))
    fixed = Fixed(frozen=frozen, ref=other, scorer=None if elsewhere else Scorer(top=other, head=head))
    given_B = jnp.asarray(rng.normal(size=6), jnp.float32) if elsewhere else None
    prompts = PromptBatch(tokens_BP=seen.tokens_BT[:, :4], mask_BP=seen.mask_BT[:, :4], index_B=jnp.arange(6))
    drawn = Sample(
        tokens_BR=seen.tokens_BT[:, 4:], mask_BR=seen.mask_BT[:, 4:], logp_BR=seen.logp_BR, finished_B=jnp.arange(6) > 2
    )

    def score(c):
        policy = ActorCritic(top=top, value=head)
        return ppo.score(arch, c, fixed, policy, jnp.float32(0.1), prompts, drawn, given_B)

    small = replace(C, optim=replace(C.optim, accumulate=2))
    assert "length=6" in str(jax.make_jaxpr(lambda: score(small))())
    whole, parts = score(replace(C, minibatches=1)), score(small)
    assert len(np.unique(np.round(whole[0].score_B, 4))) == 6
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.allclose(x, y, atol=1e-5)


def test_a_rollout_of_the_samplers_states_is_that_of_the_trunks_own(start):
    arch, frozen, policy, seen = start
    fixed = Fixed(frozen=frozen, ref=policy.top, scorer=Scorer(top=policy.top, head=policy.value))
    prompts = PromptBatch(tokens_BP=seen.tokens_BT[:, :4], mask_BP=seen.mask_BT[:, :4], index_B=jnp.arange(6))
    own = Sample(seen.tokens_BT[:, 4:], seen.mask_BT[:, 4:], logp_BR=seen.logp_BR, finished_B=jnp.arange(6) > 2)

    def score(hidden_BTD):
        drawn = own.replace(hidden_BTD=hidden_BTD)
        return ppo.score(arch, C, fixed, policy, jnp.float32(0.1), prompts, drawn)

    once_BTD = model.trunk(arch, frozen, seen.tokens_BT, seen.mask_BT)
    (whole, metrics), (same, theirs) = score(None), score(once_BTD.at[1, 0].set(99))  # row 1 begins with padding
    same = same.replace(hidden_BTD=same.hidden_BTD.at[1, 0].set(whole.hidden_BTD[1, 0]))
    for x, y in zip(jax.tree.leaves((whole, metrics)), jax.tree.leaves((same, theirs)), strict=True):
        assert np.allclose(x, y, atol=1e-5)


def test_the_gap_of_the_samplers_states_is_of_real_tokens_in_shares_of_the_largest(start):
    arch, frozen, _, seen = start
    token_BT, mask_BT = seen.tokens_BT[1:], seen.mask_BT[1:]  # the first row begins with padding
    once_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
    prompts = PromptBatch(tokens_BP=token_BT[:, :4], mask_BP=mask_BT[:, :4], index_B=jnp.arange(5))

    def gap(hidden_BTD):
        drawn = Sample(token_BT[:, 4:], mask_BT[:, 4:], seen.logp_BR[1:], jnp.arange(5) > 2, hidden_BTD)
        return rollouts.trunk_gap(arch, frozen, prompts, drawn)

    assert gap(None) == {}
    assert float(gap(once_BTD.at[0, 0].set(99))["trunk_gap"]) < 1e-5
    most = float(jnp.abs(once_BTD[0, 1:]).max())
    assert float(gap(once_BTD.at[0, 5, 3].add(0.25))["trunk_gap"]) == pytest.approx(0.25 / most, rel=1e-3)


@pytest.mark.parametrize("freeze_layers", [0.5, 0.0])
def test_minibatches_in_parts_learn_what_whole_ones_do(start, freeze_layers):
    """Also where nothing is frozen, and a rollout keeps no states."""
    arch, _, policy, seen = start
    frozen, top = split(model.init(arch, jax.random.key(0)), freeze_layers)
    fixed = Fixed(frozen=frozen, ref=top, scorer=None)
    rollout = seen.replace(hidden_BTD=model.trunk(arch, frozen, seen.tokens_BT, seen.mask_BT))
    learnt = []
    for accumulate in (1, 2):
        start_state = optim.new_state(TX, policy.replace(top=top), sharding.make_mesh(Mesh()), kl_coef=jnp.float32(0.1))
        c = replace(C, optim=replace(C.optim, accumulate=accumulate))
        learnt.append(ppo.update(arch, TX, c, start_state, fixed, rollout, jax.random.key(1))[0].params)
    for x, y in zip(*map(jax.tree.leaves, learnt), strict=True):
        assert np.allclose(x, y, atol=1e-5)
