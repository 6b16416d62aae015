"""Several texts or pairs in a row: losses and gradients are those of a row each."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import dpo, model, optim, reward, roofline, sft
from jaxrlhf.config import Dpo
from jaxrlhf.data import batches, tokens
from jaxrlhf.data.packing import Shape
from jaxrlhf.split import split
from jaxrlhf.types import Ensemble, ScalarHead, Scorer, SftBatch

WORDS = tokens.word_tokenizer([chr(ord("a") + i) for i in range(26)])
B, WIDTH = 11, 40
WINDOWS = {"gemma2": (3, 4)}
CASES = pytest.mark.parametrize(("family", "freeze_layers"), [("llama", 0.5), ("opt", 0.0), ("gemma2", 0.5)])


def architecture(family):
    sizes = {"vocab_size": 30, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8}
    sizes |= {"ff_width": 24, "max_positions": 24} | model.FAMILIES[family]
    return model.Architecture(**sizes, windows=WINDOWS.get(family, ()))


def noisy(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), tree)


def parts_of(family, freeze_layers):
    arch = architecture(family)
    return arch, *split(noisy(jax.jit(model.init, static_argnums=0)(arch, jax.random.key(0)), 0), freeze_layers)


def scorer(top, seed):
    w_D = jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, 16), jnp.float32)
    return Scorer(top=noisy(top, seed), head=ScalarHead(w_D=w_D, b=jnp.float32(0.25)))


def texts(seed):
    rng = np.random.default_rng(seed)
    return lambda low, high: "".join(f" {chr(ord('a') + i)}" for i in rng.integers(0, 26, rng.integers(low, high)))


def streams(seeds):
    """Eleven uneven pairs for each seed: in six rows, and in a row each."""
    text = texts(3)
    records = [{"prompt": text(1, 9), "chosen": text(0, 8), "rejected": text(1, 8)} for _ in range(29)]
    stream = batches.pair_batches(records, WORDS, batch_size=B, prompt_length=8, response_length=8, seeds=seeds)
    return (replace(stream, shapes=[shape]) for shape in (Shape(6, 4, [WIDTH]), Shape(B, 1, [24])))


def at(stream, step=10):
    return jax.tree.map(jnp.asarray, stream[step])


def near(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def gradients(loss, params, batch, parts=1):
    value, metrics, grads = jax.jit(
        lambda params, batch: optim.gradients(loss, params, batch, parts, lambda rows: rows.pair_BN.sum())
    )(params, batch)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-2
    return value, metrics, grads


@CASES
def test_packed_texts(family, freeze_layers):
    arch, frozen, top = parts_of(family, freeze_layers)
    text = texts(4)
    examples = [{"prompt": text(1, 9), "response": text(0, 8)} for _ in range(29)]
    stream = batches.sft_batches(
        examples, WORDS, batch_size=B, prompt_length=8, response_length=8, seed=0, prompt_weight=0.3
    )
    loss = jax.jit(jax.value_and_grad(partial(sft.loss, arch, frozen), has_aux=True))
    packed, alone = (replace(stream, shapes=[s]) for s in (Shape(4, 9, [WIDTH]), Shape(B, 1, [16])))
    near(loss(top, at(packed)), loss(top, at(alone)))


@CASES
@pytest.mark.parametrize("shape", [Shape(4, 9, [WIDTH], 24), Shape(B, 1, [16], 8)])
def test_prompts_that_weigh_nothing_are_not_asked_for(family, freeze_layers, shape):
    """The last block and the head run on what predicts responses; loss and gradient are as if they ran on all."""
    arch, frozen, top = parts_of(family, freeze_layers)
    text = texts(4)
    examples = [{"prompt": text(0, 9), "response": text(0, 8)} for _ in range(29)]
    stream = batches.sft_batches(
        examples, WORDS, batch_size=B, prompt_length=8, response_length=8, seed=0, prompt_weight=0
    )
    batch = at(replace(stream, shapes=[shape]))
    assert batch.before_BQ.shape == (shape.rows, shape.asked)
    assert batch.before_BQ.shape[1] < batch.tokens_BT.shape[1]
    whole = replace(batch, before_BQ=None)
    gradient = jax.value_and_grad(partial(sft.loss, arch, frozen), has_aux=True)
    near(jax.jit(gradient)(top, batch), jax.jit(gradient)(top, whole))
    fewer, all_flops = (roofline.flops(jax.jit(gradient).trace(top, b).jaxpr) for b in (batch, whole))
    assert fewer < 0.9 * all_flops


def test_as_many_positions_as_there_are_are_refused():
    arch, frozen, top = parts_of("llama", 0.5)
    given = jnp.ones((2, 6), jnp.int32)
    with pytest.raises(ValueError, match="before_BQ has 6 of 6 positions"):
        sft.loss(arch, frozen, top, SftBatch(given, given * 1.0, given * 1.0, given))


@CASES
def test_packed_pairs(family, freeze_layers):
    """Of the reward model and DPO; also in parts, whose rows have unequal numbers of pairs."""
    arch, frozen, top = parts_of(family, freeze_layers)
    packed, alone = (at(stream) for stream in streams([0]))
    learners = (reward.loss, scorer(top, 1), ()), (dpo.loss, noisy(top, 2), (Dpo(beta=0.5), top))
    for (loss, params, given), parts in zip(learners, (3, 1), strict=True):
        loss = partial(loss, arch, *given[:1], frozen, *given[1:])
        near(gradients(loss, params, packed, parts), gradients(loss, params, alone))


def test_packed_pairs_of_an_ensemble():
    """Each member has an order of its own, and in a part of a batch not as many pairs as another."""
    arch, frozen, top = parts_of("llama", 0.5)
    members = [scorer(top, seed) for seed in (1, 2, 3)]
    together = Ensemble(jax.tree.map(lambda *x: jnp.stack(x), *members), "mean", 0.0)
    loss, seeds = partial(reward.loss, arch, frozen), (5, 6, 7)
    each = [gradients(loss, member, at(list(streams([seed]))[1])) for member, seed in zip(members, seeds, strict=True)]
    value, metrics, grads = (jax.tree.map(lambda *x: jnp.stack(x), *found) for found in zip(*each, strict=True))
    packed, _ = streams(seeds)
    for parts in (1, 3):
        found = gradients(loss, together, at(packed), parts)
        near(found[:2], (value.sum(), jax.tree.map(jnp.mean, metrics)))
        near(found[2].members, grads)
    counts_EA = at(packed).pair_BN.sum(1).reshape(3, 2, 3).sum(1)
    assert (counts_EA != counts_EA[0]).any()
