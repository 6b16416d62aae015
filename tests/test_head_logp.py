"""Log-probabilities read off a head a few positions at a time."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import head, losses, model, rollouts, sft
from jaxrlhf.split import split
from jaxrlhf.types import Frozen, SftBatch, Top

V, D = 7, 4
TARGET_BR = jnp.asarray(np.random.default_rng(2).integers(0, V, (2, 5)), jnp.int32)
# OPT has learned positions, a tied head and, here, a narrower embedding; Gemma squashes its logits.
ARCHS = {
    "opt": {"embed_width": 3},
    "llama": {},
    "gemma2": {"final_softcap": 1.5, "windows": ()},
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def setting(family, trained):
    """A model without blocks, whose head is trained or frozen, and final states."""
    sizes = {"vocab_size": V, "layers": 1, "width": D, "heads": 1, "kv_heads": 1, "head_width": 4, "ff_width": 4}
    arch = model.Architecture(**model.FAMILIES[family] | sizes | {"max_positions": 6} | ARCHS[family])
    params = model.init(arch, jax.random.key(0))
    ends = {"embed": params["embed"], "lm_head": params["lm_head"]}
    none = {"embed": {}, "lm_head": {}}
    frozen = Frozen(blocks={}, **(none if trained else ends))
    return arch, frozen, Top(blocks={}, final_norm={}, **(ends if trained else none)), draw(2, 5, D)


def whole(arch, frozen, top, final_BRD, temperature=1.0):
    return losses.token_logp(model.logits(arch, frozen, top, final_BRD), TARGET_BR, temperature)


def close(found, wanted):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ARCHS)
@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_head_read_in_lots_equals_the_whole(width, family, trained):
    """All positions, one, and two (which do not divide the five) at a time: values, gradients of head and states."""
    arch, frozen, top, final_BRD = setting(family, trained)
    wanted, pull = jax.vjp(lambda top, x: whole(arch, frozen, top, x, 0.7), top, final_BRD)
    found, pull_found = jax.vjp(lambda top, x: head.logp(arch, frozen, top, x, TARGET_BR, 0.7, width), top, final_BRD)
    close(found, wanted)
    cotangent_BR = draw(2, 5, seed=1)
    grads = pull((cotangent_BR, jnp.zeros((2, 5))))
    assert np.abs(grads[1]).max() > 0.1
    close(pull_found((cotangent_BR, jnp.ones((2, 5)))), grads)  # an entropy has no gradient


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ARCHS)
@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_weighted_sum_in_lots_equals_the_whole(width, family, trained):
    arch, frozen, top, final_BRD = setting(family, trained)
    weight_BR = jnp.float32([[0.5, 0, 1, 0.25, 1], [0, 0, 2, 1, 0]])

    def plain(top, final_BRD):
        return -3 * (whole(arch, frozen, top, final_BRD)[0] * weight_BR).sum()

    def ours(top, final_BRD):
        return -3 * head.weighted_logp(arch, frozen, top, final_BRD, TARGET_BR, weight_BR, width)

    wanted, found = (jax.value_and_grad(f, argnums=(0, 1))(top, final_BRD) for f in (plain, ours))
    close(found, wanted)
    assert np.allclose(ours(top, final_BRD), wanted[0], atol=1e-5)  # without a gradient, another program
    odd_BRD = jnp.where(weight_BR[..., None] > 0, final_BRD, 1e4)
    close(jax.value_and_grad(ours)(top, odd_BRD), (wanted[0], wanted[1][0]))


@pytest.mark.parametrize("trained", [False, True])
def test_no_program_has_the_logits_of_all_positions(trained):
    """Nor a head's gradient for each lot."""
    arch, frozen, top, _ = setting("llama", trained)
    wide = jax.eval_shape(lambda t: jax.tree.map(lambda x: jnp.zeros((8192, 256)), t), (frozen, top))
    arch = replace(arch, vocab_size=8192, width=256)
    rows = [jax.ShapeDtypeStruct(s, t) for s, t in (((4, 1025, 256), jnp.float32), ((4, 1025), jnp.int32))]
    weight = jax.ShapeDtypeStruct((4, 1025), jnp.float32)

    def one(frozen, top, final_BRD, target_BR, weight_BR):
        return head.weighted_logp(arch, frozen, top, final_BRD, target_BR, weight_BR)

    def each(frozen, top, final_BRD, target_BR, weight_BR):
        return (head.logp(arch, frozen, top, final_BRD, target_BR)[0] * weight_BR).sum()

    for total in one, each:
        program = jax.make_jaxpr(jax.grad(total, argnums=(1, 2)))(*wide, *rows, weight)
        assert 8192 * 256 < largest(program.jaxpr) <= head.LOGITS + 8192 < 4 * 1025 * 8192


def largest(jaxpr):
    """The most numbers of an array in a program."""
    inner = [
        largest(getattr(p, "jaxpr", p))
        for e in jaxpr.eqns
        for p in jax.tree.leaves(list(e.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr"))
        if hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ]
    return max([v.aval.size for e in jaxpr.eqns for v in e.outvars] + inner, default=0)


@pytest.mark.parametrize("width", [0, 2])
def test_a_trained_head_in_half_precision_has_gradients_in_f32(width):
    """As the plain way, to bf16's rounding."""
    arch, frozen, top, final_BRD = setting("llama", True)
    arch, final_BRD, weight_BR = replace(arch, dtype="bfloat16"), final_BRD.astype(jnp.bfloat16), jnp.ones((2, 5))
    plain = lambda top, x: whole(arch, frozen, top, x)[0].sum()  # noqa: E731
    ours = lambda top, x: head.weighted_logp(arch, frozen, top, x, TARGET_BR, weight_BR, width)  # noqa: E731
    each = lambda top, x: head.logp(arch, frozen, top, x, TARGET_BR, width=width)[0].sum()  # noqa: E731
    wanted = jax.grad(plain, argnums=(0, 1))(top, final_BRD)
    for total in ours, each:
        found = jax.grad(total, argnums=(0, 1))(top, final_BRD)
        assert {x.dtype for x in jax.tree.leaves(found[0])} == {jnp.dtype("float32")}
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == y.dtype
            assert np.allclose(x.astype(jnp.float32), y.astype(jnp.float32), atol=0.02)


def test_sft_loss_is_the_weighted_mean_and_nothing_of_no_tokens():
    arch, frozen, top, _ = setting("llama", True)
    top = top.replace(final_norm=model.init(arch, jax.random.key(1))["final_norm"], blocks=blocks(arch))
    token_BT, mask_BT = jnp.int32([[1, 2, 3, 4], [5, 6, 0, 0]]), jnp.float32([[1, 1, 1, 1], [1, 1, 0, 0]])
    weight_BT = jnp.float32([[9, 0.5, 1, 0], [9, 1, 0, 0]])
    none = frozen.replace(blocks=jax.tree.map(lambda x: x[:0], top.blocks))
    batch = SftBatch(tokens_BT=token_BT, mask_BT=mask_BT, weight_BT=weight_BT)
    value, metrics = sft.loss(arch, none, top, batch)
    final_BTD = model.run_top(arch, top, token_BT, jnp.zeros((2, 4, 0)), mask_BT)[:, :-1]
    logp_BT, _ = losses.token_logp(model.logits(arch, none, top, final_BTD), token_BT[:, 1:])
    assert float(value) == pytest.approx(-float(0.5 * logp_BT[0, 0] + logp_BT[0, 1] + logp_BT[1, 0]) / 2.5, rel=1e-5)
    assert {k: float(v) for k, v in metrics.items()} == {"loss": float(value), "tokens": 2.5}
    assert float(sft.loss(arch, none, top, batch.replace(weight_BT=0 * weight_BT))[0]) == 0


def blocks(arch):
    return model.init(arch, jax.random.key(2))["blocks"]


@pytest.mark.parametrize("freeze_layers", [0.5, 0.0])
def test_a_rollout_is_read_as_by_its_logits_whoever_owns_the_head(freeze_layers):
    """Values, entropies and gradients of TOP; with `entropy_gradient`, the entropy's too."""
    arch = model.Architecture(
        **model.FAMILIES["llama"],
        vocab_size=13, layers=2, width=8, heads=2, kv_heads=1, head_width=4, ff_width=12, max_positions=16,
    )  # fmt: skip
    rng, R = np.random.default_rng(1), 3
    shapes = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.35, x.shape), jnp.float32), shapes)
    frozen, top = split(params, freeze_layers)
    token_BT = jnp.asarray(rng.integers(0, 13, (2, 7)), jnp.int32)
    mask_BT = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], jnp.float32)
    weight_BR, other_BR = (jnp.asarray(rng.normal(size=(2, R)), jnp.float32) for _ in range(2))

    def total(top, read):
        hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
        logp_BR, entropy_BR = read(top, hidden_BTD)
        return (logp_BR * weight_BR + entropy_BR * other_BR).sum()

    def plain(top, hidden_BTD):
        final_BTD = model.run_top(arch, top, token_BT, hidden_BTD, mask_BT)
        logits_BTV = model.logits(arch, frozen, top, final_BTD)
        return losses.token_logp(logits_BTV[:, -R - 1 : -1], token_BT[:, -R:], 0.7)

    def ours(top, hidden_BTD, entropy_gradient):
        final_BRD = rollouts.final_states(arch, top, token_BT, hidden_BTD, mask_BT, R)
        return rollouts.read(arch, frozen, top, final_BRD, token_BT, 0.7, entropy_gradient)

    def without(top, hidden_BTD):
        logp_BR, entropy_BR = plain(top, hidden_BTD)
        return logp_BR, jax.lax.stop_gradient(entropy_BR)

    for found, wanted in (
        (lambda *x: ours(*x, True), plain),
        (lambda *x: ours(*x, False), without),
    ):
        (a, a_grads), (b, b_grads) = (
            jax.jit(jax.value_and_grad(total), static_argnums=1)(top, r) for r in (found, wanted)
        )
        assert np.allclose(a, b, atol=1e-5)
        for x, y in zip(jax.tree.leaves(a_grads), jax.tree.leaves(b_grads), strict=True):
            assert np.allclose(x, y, atol=1e-5)
