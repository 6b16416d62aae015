"""Stages' pure parts on a small random model: DPO, groups, forward KL and ensembles against brute force."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf import dpo, groups, losses, model, optim, policies, ppo, reward, rollouts
from jaxrlhf.config import Dpo, Grpo, Optim, Ppo, Rloo
from jaxrlhf.data import batches, tokens
from jaxrlhf.sampling import Generation, sample
from jaxrlhf.split import split
from jaxrlhf.types import (
    CHOSEN,
    REJECTED,
    ActorCritic,
    Ensemble,
    Fixed,
    PairBatch,
    PromptBatch,
    ScalarHead,
    Scorer,
    TrainState,
)

ARCH = model.Architecture(
    vocab_size=13,
    layers=2,
    width=16,
    heads=2,
    kv_heads=2,
    head_width=8,
    ff_width=24,
    max_positions=16,
    **model.FAMILIES["llama"],
)
N, P, R = 4, 5, 6


def noisy(tree, seed, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32), tree)


FROZEN, REF = split(noisy(model.init(ARCH, jax.random.key(0)), 0), 0.5)
POLICY = noisy(REF, 1, 0.1)


def scorer(seed):
    w_D = jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, 16), jnp.float32)
    return Scorer(top=noisy(REF, seed, 0.1), head=ScalarHead(w_D=w_D, b=jnp.float32(0.25)))


def stacked(scorers, combine="mean", coef=0.0):
    members = jax.tree.map(lambda *x: jnp.stack(x), *scorers)
    return Ensemble(members=members, combine=combine, uncertainty_coef=coef)


SCORERS = [scorer(s) for s in (2, 3, 4)]
FIXED = Fixed(frozen=FROZEN, ref=REF, scorer=SCORERS[0])


@pytest.fixture(scope="module")
def drawn():
    """Three prompts of uneven lengths, each as often as it has responses, and those responses."""
    rng = np.random.default_rng(5)
    token_BP = rng.integers(2, 13, (3, P)).astype(np.int32)
    mask_BP = (np.arange(P) >= np.array([[0], [2], [4]])).astype(np.float32)
    found = sample(ARCH, Generation(R), FROZEN, POLICY, token_BP, mask_BP, jax.random.key(6), N)
    every = [jnp.repeat(jnp.asarray(x), N, 0) for x in (token_BP, mask_BP, np.arange(3, dtype=np.int32))]
    assert len(set(np.asarray(found.mask_BR).sum(1).tolist())) > 2
    return PromptBatch(*every), found


def logits_of(top, rollout):
    hidden_BTD = model.trunk(ARCH, FROZEN, rollout.tokens_BT, rollout.mask_BT)
    final_BTD = model.run_top(ARCH, top, rollout.tokens_BT, hidden_BTD, rollout.mask_BT)
    return model.logits(ARCH, FROZEN, top, final_BTD)[:, -R - 1 : -1]


def begin(tx, params):
    counts = {"step": jnp.int32(0), "skipped": jnp.int32(0), "in_a_row": jnp.int32(0)}
    return TrainState(params=jax.tree.map(jnp.copy, params), opt_state=tx.init(params), **counts)


def one_step(tx, params, update):
    """What a step of plain gradient descent at rate 1 takes away: the gradient."""
    after, metrics = update(begin(tx, params))
    return jax.tree.map(lambda a, b: a - b, params, after.params), metrics


def close(a, b, tolerance=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
def test_log_ratios_are_those_of_whole_responses_read_without_padding(drawn, temperature):
    prompts, found = drawn
    token_BT = jnp.concatenate([prompts.tokens_BP, found.tokens_BR], 1)
    mask_BT = jnp.concatenate([prompts.mask_BP, found.mask_BR], 1)
    ratio_B = rollouts.log_ratio(ARCH, FROZEN, POLICY, REF, token_BT, mask_BT, R, temperature)
    for ratio, row, mask, response in zip(ratio_B, token_BT, mask_BT, found.mask_BR, strict=True):
        ids, words = row[mask > 0][None], int(response.sum())
        whole, expected = jnp.ones(ids.shape), 0.0
        for top, sign in ((POLICY, 1), (REF, -1)):
            final = model.run_top(ARCH, top, ids, model.trunk(ARCH, FROZEN, ids, whole), whole)
            logp_TV = jax.nn.log_softmax(model.logits(ARCH, FROZEN, top, final)[0] / temperature)
            expected += sign * sum(float(logp_TV[t - 1, ids[0, t]]) for t in range(ids.shape[1] - words, ids.shape[1]))
        assert float(ratio) == pytest.approx(expected, abs=1e-4)


# Groups.


def test_rloo_learns_from_scores_less_kl_of_whole_responses(drawn):
    c = Rloo(samples=N, kl_coef=0.3, minibatches=1)
    rollout, metrics = groups.score(ARCH, Ppo(), c, FIXED, POLICY, *drawn)
    mask_BR = rollout.response_mask_BR
    kl_B = ((rollout.logp_BR - rollout.ref_logp_BR) * mask_BR).sum(-1)
    return_BN = np.asarray(rollout.score_B - 0.3 * kl_B).reshape(3, N)
    others_BN = (return_BN.sum(1, keepdims=True) - return_BN) / (N - 1)
    close(rollout.advantage_B, (return_BN - others_BN).reshape(-1))
    assert float(metrics["kl"]) == pytest.approx(float(kl_B.mean()), rel=1e-5)
    assert float(metrics["sampler_gap"]) < 1e-4

    def by_hand(top):
        logp_BR = losses.token_logp(logits_of(top, rollout), rollout.tokens_BT[:, -R:])[0]
        return -(rollout.advantage_B * (logp_BR * mask_BR).sum(-1)).mean()

    tx = optax.sgd(1.0)
    update = lambda state: groups.update(ARCH, tx, c, state, FROZEN, rollout, jax.random.key(0))  # noqa: E731
    close(one_step(tx, POLICY, update)[0], jax.grad(by_hand)(POLICY))


def test_rloo_with_two_responses_and_no_kl_climbs_by_their_difference(drawn):
    prompts, found = (jax.tree.map(lambda x: x[np.array([0, 1, 4, 5])], t) for t in drawn)
    rollout, _ = groups.score(ARCH, Ppo(), Rloo(samples=2, kl_coef=0.0), FIXED, POLICY, prompts, found)
    d = np.asarray(rollout.score_B)
    close(rollout.advantage_B, np.array([d[0] - d[1], d[1] - d[0], d[2] - d[3], d[3] - d[2]]))


def test_grpo_keeps_its_kl_out_of_the_advantage(drawn):
    rollout, _ = groups.score(ARCH, Ppo(), Grpo(samples=N, kl_coef=5.0), FIXED, POLICY, *drawn)
    score_BN = np.asarray(rollout.score_B).reshape(3, N)
    expected_BN = (score_BN - score_BN.mean(1, keepdims=True)) / (score_BN.std(1, keepdims=True) + 1e-4)
    close(rollout.advantage_B, expected_BN.reshape(-1))


def test_groups_climb_the_reward_that_ppo_shapes(drawn):
    shaping = Ppo(eos_required=True, eos_missing=-3.5, length_penalty=0.5)
    rollout, _ = groups.score(ARCH, shaping, Grpo(samples=N), FIXED, POLICY, *drawn)
    plain, _ = groups.score(ARCH, Ppo(), Grpo(samples=N), FIXED, POLICY, *drawn)
    share_B, ended_B = np.asarray(drawn[1].mask_BR).sum(1) / R, np.asarray(drawn[1].finished_B)
    close(rollout.score_B, np.where(ended_B, plain.score_B - 0.5 * share_B**5, -3.5))


def test_scores_from_elsewhere_take_the_place_of_the_scorer(drawn):
    given_B = jnp.arange(12) / 4 - 1.5
    rollout, metrics = groups.score(
        ARCH, Ppo(), Grpo(samples=N, unbiased=True), replace_scorer(None), POLICY, *drawn, given_B
    )
    close(rollout.advantage_B, (given_B.reshape(3, N) - given_B.reshape(3, N).mean(1, keepdims=True)).reshape(-1))
    assert float(metrics["score"]) == pytest.approx(-0.125)


def replace_scorer(found):
    return Fixed(frozen=FROZEN, ref=REF, scorer=found)


def test_every_epoch_visits_each_response_once():
    B = 12
    seen = begin(optax.sgd(1.0), jnp.zeros(B))
    rollout = Visited(score_B=jnp.arange(B))
    loss = lambda counts, mb: (-counts[mb.score_B].sum(), {})  # noqa: E731
    for c in (Grpo(minibatches=4), Grpo(minibatches=2, optim=Optim(accumulate=3))):
        weight = lambda mb: c.optim.accumulate * jnp.float32(mb.score_B.size)  # noqa: B023, E731
        sgd = optax.sgd(c.optim.accumulate)  # the mean over parts, undone
        after, metrics = rollouts.epochs(sgd, loss, weight, seen, rollout, jax.random.key(1), 3, c)
        assert after.params.tolist() == pytest.approx([3.0] * B)
        assert float(metrics["grad_norm"]) == pytest.approx((B / c.minibatches) ** 0.5 / c.optim.accumulate)


class Visited(dict):
    """A rollout that says who it holds."""

    def __init__(self, score_B):
        super().__init__(score_B=score_B)
        self.score_B = score_B


jax.tree_util.register_pytree_node(Visited, lambda v: ((v.score_B,), None), lambda _, leaves: Visited(*leaves))


@pytest.mark.parametrize("c", [Ppo(forward_kl_coef=0.2), Rloo(samples=N), Grpo(samples=N)], ids=["ppo", "rloo", "grpo"])
def test_minibatches_in_parts_are_the_same_updates(drawn, c):
    head = ScalarHead(w_D=jnp.linspace(-0.2, 0.3, ARCH.width), b=jnp.float32(0.1))
    start = ActorCritic(top=POLICY, value=head) if isinstance(c, Ppo) else POLICY
    # Smooth in the gradient, whose rounding Adam would blow up.
    found, tx = [], optax.sgd(0.5)
    for parts in (1, 3):
        c = replace(c, minibatches=2, optim=Optim(accumulate=parts))
        if isinstance(c, Ppo):
            rollout, _ = ppo.score(ARCH, c, FIXED, start, jnp.float32(0.05), *drawn)
            state, metrics = ppo.update(ARCH, tx, c, begin(tx, start), FIXED, rollout, jax.random.key(1))
        else:
            rollout, _ = groups.score(ARCH, Ppo(), c, FIXED, start, *drawn)
            state, metrics = groups.update(ARCH, tx, c, begin(tx, start), FROZEN, rollout, jax.random.key(1))
        found.append((state.params, metrics["loss"]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Forward KL.


def test_forward_kl_equals_the_whole_logits_and_so_does_its_gradient(drawn):
    c = Ppo(minibatches=1, epochs=1, forward_kl_coef=0.7, temperature=0.8, value_coef=0.0)
    head = ScalarHead(w_D=jnp.zeros(16), b=jnp.float32(0))
    policy = ActorCritic(top=POLICY, value=head)
    rollout, _ = ppo.score(ARCH, c, FIXED, policy, jnp.float32(0.05), *drawn)

    def brute(top):
        ref_BRV, own_BRV = (jax.nn.log_softmax(logits_of(t, rollout) / 0.8) for t in (REF, top))
        kl_BR = (jnp.exp(ref_BRV) * (ref_BRV - own_BRV)).sum(-1)
        return (kl_BR * rollout.response_mask_BR).sum() / rollout.response_mask_BR.sum()

    tx = optax.sgd(1.0)
    grads = []
    for coef in (0.0, 0.7):
        update = partial(ppo.update, ARCH, tx, replace(c, forward_kl_coef=coef))
        grad, metrics = one_step(tx, policy, lambda s, u=update: u(s, FIXED, rollout, jax.random.key(2)))
        grads.append(grad.top)
    value, expected = jax.value_and_grad(brute)(POLICY)
    assert float(metrics["forward_kl"]) == pytest.approx(float(value), rel=1e-5)
    assert float(value) > 0.01
    close(jax.tree.map(lambda a, b: (b - a) / 0.7, *grads), expected, 1e-4)


# DPO.


@pytest.fixture(scope="module")
def pairs():
    words = tokens.word_tokenizer(["a", "b", "c", "d"])
    records = [
        {"prompt": "a b", "chosen": " c", "rejected": " d d a", "rejected_finished": "0"},
        {"prompt": "d", "chosen": " a b c", "rejected": " b"},
    ]
    stream = batches.pair_batches(records, words, batch_size=2, prompt_length=4, response_length=4, seeds=[0])
    return replace(stream, shapes=stream.shapes[-1:])[0]  # a row each


def test_pairs_say_where_their_responses_are(pairs):
    sizes = sorted([int((row == side).sum()) for side in (1, 1 + CHOSEN, 1 + REJECTED)] for row in pairs.mask_BT)
    assert sizes == [[1, 4, 2], [2, 2, 3]]


def test_dpo_reads_responses_alone(pairs):
    batch = jax.tree.map(jnp.asarray, pairs)
    hidden_BTD = model.trunk(ARCH, FROZEN, batch.tokens_BT, batch.mask_BT)
    logp_BT = dpo.token_logp(ARCH, FROZEN, POLICY, batch.tokens_BT, hidden_BTD, batch.mask_BT)
    for row, mask, logp_T in zip(pairs.tokens_BT, pairs.mask_BT, logp_BT, strict=True):
        for side in (1 + CHOSEN, 1 + REJECTED):
            ids = row[(mask == 1) | (mask == side)][None]  # without padding and the other response
            ones = jnp.ones(ids.shape)
            hidden = model.trunk(ARCH, FROZEN, ids, ones)
            final = model.run_top(ARCH, POLICY, ids, hidden, ones)
            each_TV = jax.nn.log_softmax(model.logits(ARCH, FROZEN, POLICY, final)[0])
            expected = [each_TV[t - 1, ids[0, t]] for t in range(int((mask == 1).sum()), ids.shape[1])]
            np.testing.assert_allclose(logp_T[mask == side], expected, atol=1e-4)


def test_a_token_that_nothing_precedes_has_no_log_probability():
    mask_BT = 1 + jnp.asarray([[CHOSEN, CHOSEN, REJECTED, REJECTED, -1]])  # an empty prompt
    token_BT = jnp.asarray([[3, 4, 5, 6, 0]])
    hidden_BTD = model.trunk(ARCH, FROZEN, token_BT, mask_BT)
    logp_BT = dpo.token_logp(ARCH, FROZEN, POLICY, token_BT, hidden_BTD, mask_BT)
    assert logp_BT[0, [0, 2]].tolist() == [0, 0]
    assert (logp_BT[0, [1, 3]] < 0).all()


def test_a_pairs_scores_are_those_of_its_responses_alone(pairs):
    batch = jax.tree.map(jnp.asarray, pairs)
    hidden_BTD = model.trunk(ARCH, FROZEN, batch.tokens_BT, batch.mask_BT)
    found_B2 = policies.read_pairs(ARCH, SCORERS[0], batch, hidden_BTD)[:, 0]
    for row, mask, found_2 in zip(pairs.tokens_BT, pairs.mask_BT, found_B2, strict=True):
        for side, found in zip((1 + CHOSEN, 1 + REJECTED), found_2, strict=True):
            ids = row[(mask == 1) | (mask == side)][None]
            assert float(found) == pytest.approx(
                float(policies.score(ARCH, FROZEN, SCORERS[0], ids, np.ones(ids.shape))[0]), abs=1e-5
            )
    assert np.abs(np.diff(found_B2)).max() > 0.5


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_starts_at_the_reference_and_learns_the_pairs(pairs, kind):
    c, batch = Dpo(loss=kind, beta=0.5), jax.tree.map(jnp.asarray, pairs)
    tx = optim.optimizer(Optim(lr=0.02), 12)
    state, seen = begin(tx, REF), []
    for _ in range(12):
        state, metrics = dpo.step(ARCH, tx, c, state, FROZEN, REF, batch)
        seen.append({k: float(v) for k, v in metrics.items()})
    assert seen[0]["loss"] == pytest.approx({"sigmoid": np.log(2), "ipo": 1.0}[kind], rel=1e-4)
    assert abs(seen[0]["margin"]) < 1e-5
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert seen[-1]["accuracy"] == 1
    # Its gradient moves TOP alone, and IPO's aim is a margin of beta / (2 beta).
    assert seen[-1]["margin"] > (0.2 if kind == "sigmoid" else 0.1)


def test_dpo_in_parts_is_the_step_of_the_whole_batch(pairs):
    tx, batch = optax.sgd(0.5), jax.tree.map(jnp.asarray, pairs)
    found = [
        dpo.step(ARCH, tx, Dpo(optim=Optim(accumulate=parts)), begin(tx, POLICY), FROZEN, REF, batch)
        for parts in (1, 2)
    ]
    for a, b in zip(*(jax.tree.leaves((state.params, m["loss"])) for state, m in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Ensembles.


@pytest.mark.parametrize("combine", ["mean", "worst", "uncertainty"])
def test_an_ensembles_score_is_its_members_combined(drawn, combine):
    prompts, found = drawn
    rows = (
        jnp.concatenate([prompts.tokens_BP, found.tokens_BR], 1),
        jnp.concatenate([prompts.mask_BP, found.mask_BR], 1),
    )
    each = np.stack([policies.score(ARCH, FROZEN, s, *rows) for s in SCORERS])
    expected = {"mean": each.mean(0), "worst": each.min(0), "uncertainty": each.mean(0) - 0.4 * each.var(0)}[combine]
    close(policies.score(ARCH, FROZEN, stacked(SCORERS, combine, 0.4), *rows), expected)
    fixed = replace_scorer(stacked(SCORERS, combine, 0.4))
    close(groups.score(ARCH, Ppo(), Grpo(samples=N), fixed, POLICY, *drawn)[0].score_B, expected)
    assert each.std(0).max() > 0.05


def test_members_learn_side_by_side_as_they_would_alone(pairs):
    """Also where a gradient is clipped: the norm is each member's own."""
    other = PairBatch(*(np.roll(x, 1, 0) for x in jax.tree.leaves(pairs)))  # chosen and rejected change places
    both = jax.tree.map(lambda *x: jnp.concatenate(x), pairs, other)
    tx, size = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9)), 2
    each = optim.of_each(tx)
    start = stacked(SCORERS[:size])
    together = begin(each, start)
    alone = [begin(tx, s) for s in SCORERS[:size]]
    for _ in range(3):
        together, metrics = reward.step(ARCH, each, together, FROZEN, both)
        found = [reward.step(ARCH, tx, a, FROZEN, b) for a, b in zip(alone, (pairs, other), strict=True)]
        alone = [state for state, _ in found]
        assert float(metrics["loss"]) == pytest.approx(np.mean([float(m["loss"]) for _, m in found]), rel=1e-4)
    for e in range(size):
        close(jax.tree.map(lambda x, e=e: x[e], together.params.members), alone[e].params)
