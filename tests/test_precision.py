"""bf16 compute: what is trained keeps f32 masters, what is frozen is bf16, and the numbers stay near those in f32."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf import experiment, model, sft, weights
from jaxrlhf.config import Experiment, Model
from jaxrlhf.sampling import Generation, sample
from jaxrlhf.split import split
from jaxrlhf.types import SftBatch

HF = Path(__file__).parent / "golden" / "hf"
BF16 = np.dtype(ml_dtypes.bfloat16)


def batch(vocab: int) -> SftBatch:
    rng = np.random.default_rng(0)
    mask_BT = (np.arange(12) < np.array([[12], [7], [3]])).astype(np.float32)
    weight_BT = mask_BT * (np.arange(12) > 1)
    return SftBatch(
        jnp.asarray(rng.integers(2, vocab, (3, 12)), jnp.int32), jnp.asarray(mask_BT), jnp.asarray(weight_BT)
    )


def in_both(name):
    arch, params = weights.load(HF / name)
    frozen, top = split(params, 0.5)
    half = replace(arch, dtype="bfloat16")
    return arch, frozen, half, jax.tree.map(lambda x: x.astype(BF16), frozen), top


def vector(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["llama3", "opt", "gemma2"])
def test_losses_and_gradients_are_near_those_in_f32(name):
    arch, frozen, half, frozen_half, top = in_both(name)
    data = batch(arch.vocab_size)
    wanted, wanted_grads = jax.value_and_grad(lambda t: sft.loss(arch, frozen, t, data)[0])(top)
    found, grads = jax.value_and_grad(lambda t: sft.loss(half, frozen_half, t, data)[0])(top)
    assert found.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype(np.float32)}
    assert 0 < abs(float(found - wanted)) < 0.02 * float(wanted)
    a, b = vector(grads), vector(wanted_grads)
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    hidden_BTD = model.trunk(half, frozen_half, data.tokens_BT, data.mask_BT)
    assert hidden_BTD.dtype == BF16
    assert model.logits(half, frozen_half, top, hidden_BTD).dtype == jnp.float32


def test_the_sampler_agrees_with_teacher_forcing_but_for_rounding():
    _, _, arch, frozen, top = in_both("llama3")
    prompt_BP = jnp.asarray([[0, 4, 9, 2], [7, 3, 5, 6]], jnp.int32)
    mask_BP = jnp.asarray([[0, 1, 1, 1], [1, 1, 1, 1]], jnp.float32)
    drawn = sample(arch, Generation(6), frozen, top, prompt_BP, mask_BP, jax.random.key(0), 2)
    token_MT = jnp.concatenate([jnp.repeat(prompt_BP, 2, 0), drawn.tokens_BR], 1)
    mask_MT = jnp.concatenate([jnp.repeat(mask_BP, 2, 0), drawn.mask_BR], 1)
    final_MTD = model.run_top(arch, top, token_MT, model.trunk(arch, frozen, token_MT, mask_MT), mask_MT)
    logp_MTV = jax.nn.log_softmax(model.logits(arch, frozen, top, final_MTD)[:, 3:-1])
    forced_MR = np.take_along_axis(np.asarray(logp_MTV), np.asarray(drawn.tokens_BR)[..., None], -1)[..., 0]
    gap_MR = np.abs((forced_MR - drawn.logp_BR) * drawn.mask_BR)
    assert gap_MR.max() < 0.15  # logits of this model span tens, so a bf16 step of one is up to .1
    assert gap_MR.sum() / np.asarray(drawn.mask_BR).sum() < 0.03


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_imported_bf16_checkpoint_keeps_its_bits_where_it_is_frozen(tmp_path, dtype):
    stored = {k: v.astype(BF16) for k, v in load_file(HF / "opt" / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((HF / "opt" / "config.json").read_bytes())
    config = Experiment(model=Model(init=str(tmp_path), prompt_length=16, response_length=8, dtype=dtype))
    task = SimpleNamespace(tokenizer=SimpleNamespace(size=53))
    run = experiment.Run(config, tmp_path, task, "test")  # pyright: ignore
    frozen, top = run.base
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(top)} == {"float32"}
    name = next(k for k in stored if k.endswith("embed_tokens.weight"))
    assert np.array_equal(np.asarray(frozen.embed["tokens"], np.float32), stored[name].astype(np.float32))
