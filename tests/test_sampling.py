from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrlhf import attention, model, sampling
from jaxrlhf.sampling import Generation, sample, warp
from jaxrlhf.split import split

VOCAB, EOS, PAD = 11, 1, 0
P, R, N = 6, 5, 8  # few shapes, as most of the time goes into compiling


def setup(family: str = "llama", freeze_layers: float = 0.5, sharpness: float = 1.0, **options):
    """A random model with grouped queries where the family has them, and ragged left-padded prompts."""
    learned = model.FAMILIES[family].get("positions") == "learned"
    sizes = {
        "vocab_size": VOCAB,
        "layers": 2,
        "width": 16,
        "heads": 4,
        "kv_heads": 4 if learned else 2,
        "head_width": 4 if learned else 8,
        "ff_width": 24,
        "max_positions": P + R + 4,
    }
    arch = model.Architecture(**(sizes | model.FAMILIES[family] | options))
    shapes = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.35, x.shape), jnp.float32), shapes)
    if arch.final_norm:
        params["final_norm"]["scale"] = params["final_norm"]["scale"] * sharpness
    prompt_BP = rng.integers(2, VOCAB, (3, P)).astype(np.int32)
    mask_BP = (np.arange(P) >= np.array([[0], [2], [5]])).astype(np.float32)
    return arch, *split(params, freeze_layers), prompt_BP, mask_BP


@partial(jax.jit, static_argnames=("arch", "prompt_length"))
def teacher_logits(arch, frozen, top, tokens_MT, mask_MT, prompt_length):
    """The logits from which each response token is drawn, by one pass over prompt and response together."""
    hidden_MTD = model.trunk(arch, frozen, tokens_MT, mask_MT)
    final_MTD = model.run_top(arch, top, tokens_MT, hidden_MTD, mask_MT)
    return model.logits(arch, frozen, top, final_MTD)[:, prompt_length - 1 : -1]


def forced(arch, frozen, top, prompt_BP, mask_BP, drawn) -> np.ndarray:
    n = len(drawn.tokens_BR) // len(prompt_BP)
    tokens_MT = np.concatenate([np.repeat(prompt_BP, n, 0), drawn.tokens_BR], 1)
    mask_MT = np.concatenate([np.repeat(mask_BP, n, 0), drawn.mask_BR], 1)
    return np.asarray(teacher_logits(arch, frozen, top, tokens_MT, mask_MT, prompt_BP.shape[1]))


@pytest.mark.parametrize(
    ("family", "freeze_layers", "temperature", "options"),
    [
        ("llama", 0.5, 1.0, {}),
        ("opt", 0.0, 0.7, {}),
        ("gpt2", 1.0, 0.7, {}),
        ("opt", 0.5, 1.0, {"norm_place": "post", "final_norm": False, "embed_width": 8}),
        ("gemma2", 0.5, 1.0, {"windows": (3, 0)}),
        ("mistral", 0.5, 1.0, {"windows": (0, 4), "rope_scaling": (2.0,)}),
        ("qwen3", 0.0, 1.0, {"windows": (1, 6)}),
        ("gpt_neox", 0.5, 1.0, {}),
    ],
)
def test_log_probabilities_are_those_of_teacher_forcing(family, freeze_layers, temperature, options):
    arch, frozen, top, prompt_BP, mask_BP = setup(family, freeze_layers, **options)
    gen = Generation(R, temperature, eos_id=EOS, pad_id=PAD)
    drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(0), N)
    logits_MRV = forced(arch, frozen, top, prompt_BP, mask_BP, drawn)
    logp_MRV = np.asarray(jax.nn.log_softmax(logits_MRV / temperature))
    wanted_MR = np.take_along_axis(logp_MRV, np.asarray(drawn.tokens_BR)[..., None], -1)[..., 0] * drawn.mask_BR
    assert drawn.tokens_BR.shape == (3 * N, R)
    assert np.abs(drawn.logp_BR - wanted_MR).max() < 1e-5
    assert drawn.mask_BR.sum() > 3 * N * R / 2


def test_greedy_is_the_argmax_of_teacher_forcing_and_padding_changes_nothing():
    arch, frozen, top, prompt_BP, mask_BP = setup()
    gen = Generation(R, 0.0, eos_id=EOS, pad_id=PAD)
    drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(0))
    best_MR = forced(arch, frozen, top, prompt_BP, mask_BP, drawn).argmax(-1)
    assert np.array_equal(drawn.tokens_BR, np.where(drawn.mask_BR > 0, best_MR, PAD))
    assert len({tuple(row) for row in np.asarray(drawn.tokens_BR).tolist()}) > 1
    for planted in (PAD, 7):
        wide_BP = np.concatenate([np.full((3, 4), planted, np.int32), np.where(mask_BP > 0, prompt_BP, planted)], 1)
        wide_mask_BP = np.concatenate([np.zeros((3, 4), np.float32), mask_BP], 1)
        wide = sample(arch, gen, frozen, top, wide_BP, wide_mask_BP, jax.random.key(9))
        assert np.array_equal(wide.tokens_BR, drawn.tokens_BR)


def test_end_of_text_ends_a_row():
    arch, frozen, top, prompt_BP, mask_BP = setup(sharpness=0.3)
    gen = Generation(R, eos_id=EOS, pad_id=PAD)
    drawn = jax.tree.map(np.asarray, sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(3), N))
    assert 0 < drawn.finished_B.sum() < len(drawn.finished_B)
    lengths = set()
    for tokens, mask, logp, finished in zip(
        drawn.tokens_BR, drawn.mask_BR, drawn.logp_BR, drawn.finished_B, strict=True
    ):
        ends = np.flatnonzero((tokens == EOS) & (mask > 0))
        length = ends[0] + 1 if len(ends) else R
        assert finished == (len(ends) > 0)
        assert mask.tolist() == [1.0] * length + [0.0] * (R - length)
        assert (tokens[length:] == PAD).all()
        assert (logp[length:] == 0).all()
        assert (logp[:length] < 0).all()
        lengths.add(int(length))
    assert len(lengths) > 2


def test_all_rows_ended_leaves_only_padding():
    """The loop stops early; what it did not reach must be padding, not rubbish."""
    arch, frozen, top, prompt_BP, mask_BP = setup()
    gen = Generation(R, 0.0, eos_id=EOS, pad_id=PAD)
    first = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(0))
    prompt_BP, mask_BP = prompt_BP[[0, 0, 0]], mask_BP[[0, 0, 0]]
    eos = int(first.tokens_BR[0, 0])
    gen = Generation(R, 0.0, eos_id=eos, pad_id=10)
    drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(0))
    assert drawn.tokens_BR.tolist() == [[eos] + [10] * (R - 1)] * 3
    assert drawn.mask_BR.tolist() == [[1] + [0] * (R - 1)] * 3
    assert drawn.finished_B.tolist() == [True] * 3


def test_keys_decide_and_samples_of_a_prompt_differ():
    arch, frozen, top, prompt_BP, mask_BP = setup()
    gen = Generation(R, eos_id=EOS, pad_id=PAD)
    a, again, b = (
        np.asarray(sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(k), N).tokens_BR)
        for k in (0, 0, 1)
    )
    assert np.array_equal(a, again)
    assert not np.array_equal(a, b)
    for rows in a.reshape(3, N, R):
        assert len({tuple(row) for row in rows.tolist()}) > 4


def test_first_tokens_are_drawn_with_the_models_probabilities():
    arch, frozen, top, prompt_BP, mask_BP = setup()
    gen = Generation(1, eos_id=EOS, pad_id=PAD)
    drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(5), 4000)
    p_BV = np.asarray(jax.nn.softmax(forced(arch, frozen, top, prompt_BP, mask_BP, drawn)[::4000, 0]), np.float64)
    for tokens, p_V in zip(np.asarray(drawn.tokens_BR).reshape(3, 4000), p_BV, strict=True):
        seen_V = np.bincount(tokens, minlength=VOCAB)
        common = p_V * 4000 >= 5
        observed = np.append(seen_V[common], seen_V[~common].sum() + 1e-9)
        expected = np.append(p_V[common], p_V[~common].sum() + 1e-9 / 4000) * 4000
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
        assert stats.chisquare(np.roll(seen_V, 1) + 1e-9, p_V / p_V.sum() * (seen_V + 1e-9).sum()).pvalue < 1e-4


def test_draws_by_hand():
    """Nine words lie in three blocks of three; masses .1 .2 .05 | 0 .25 .1 | .1 .15 .05, so blocks .35 .35 .30."""
    p_V = np.array([0.1, 0.2, 0.05, 0, 0.25, 0.1, 0.1, 0.15, 0.05], np.float32)
    uniform_M2 = [(0, 0), (0.34, 0.3), (0.34, 0.99), (0.36, 0), (0.69, 0.72), (0.71, 0.32), (0.9999999, 0.9999999)]
    logits_MV = jnp.tile(jnp.where(p_V > 0, jnp.log(p_V), attention.MASKED) + 7, (7, 1))
    token_M, logp_M = sampling.draw(logits_MV, jnp.asarray(uniform_M2, jnp.float32))
    assert token_M.tolist() == [0, 1, 2, 4, 5, 6, 8]
    assert np.allclose(np.exp(logp_M), p_V[np.asarray(token_M)], rtol=1e-5)


@pytest.mark.parametrize("most", [True, False])
def test_draws_always_are_of_a_word_with_mass(most):
    """Of a large vocabulary of which top-k has left few words, and at the ends of what uniform numbers can be."""
    rng, V, M = np.random.default_rng(4), 131_071, 512
    left_MX = rng.integers(0, V, (M, 60))
    logits_MV = np.full((M, V), attention.MASKED, np.float32)
    np.put_along_axis(logits_MV, left_MX, rng.normal(0, 3, left_MX.shape).astype(np.float32), 1)
    uniform_M2 = jnp.full((M, 2), 1 - 2**-23 if most else 0.0, jnp.float32)
    token_M, logp_M = map(np.asarray, jax.jit(sampling.draw)(logits_MV, uniform_M2))
    ends_M = (left_MX.max(1) if most else left_MX.min(1)).tolist()
    assert np.isfinite(logp_M).all()
    assert np.mean(token_M == ends_M) > 0.9  # a word of next to no mass at the very end may be passed over
    assert (token_M[:, None] == left_MX).any(1).all()


@pytest.mark.parametrize("V", [7, 64, 1009])
def test_draws_have_the_probabilities_of_the_softmax_and_leave_out_what_has_none(V):
    logits_V = np.random.default_rng(V).normal(0, 2, V).astype(np.float32)
    logits_V[::3] = attention.MASKED
    n = 40_000
    uniform_M2 = jax.random.uniform(jax.random.key(1), (n, 2))
    token_M, logp_M = map(np.asarray, sampling.draw(jnp.tile(logits_V, (n, 1)), uniform_M2))
    logp_V = np.asarray(jax.nn.log_softmax(logits_V))
    assert np.allclose(logp_M, logp_V[token_M], atol=1e-5)
    seen_V, expected_V = np.bincount(token_M, minlength=V), n * np.exp(logp_V.astype(np.float64))
    assert seen_V[::3].sum() == 0
    rare = expected_V < 5
    observed, expected = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (seen_V, expected_V))
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("keep_trunk", [False, True])
def test_rows_that_leave_change_nothing(monkeypatch, keep_trunk):
    """The same tokens, and the same states of the trunk, worked out in fewer rows."""
    samples = 8
    arch, frozen, top, prompt_BP, mask_BP = setup(sharpness=0.3)
    prompt_BP, mask_BP = np.repeat(prompt_BP, 5, 0), np.repeat(mask_BP, 5, 0)
    prompt_BP[:, -1] = np.arange(15) % VOCAB
    gen, worked, advance = Generation(32, eos_id=EOS, pad_id=PAD), [], sampling._advance

    def counted(*args):
        jax.debug.callback(worked.append, len(args[-1].rows.row_m))
        return advance(*args)

    monkeypatch.setattr(sampling, "_advance", counted)
    found = []
    for halvings in (0, 2):
        monkeypatch.setattr(sampling, "HALVINGS", halvings)
        monkeypatch.setattr(sampling, "FEWEST", 3)
        sampling.sample.clear_cache()
        drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(3), samples, keep_trunk)
        jax.effects_barrier()
        found.append((jax.device_get(drawn), sum(worked), set(map(int, worked))))
        worked.clear()
    sampling.sample.clear_cache()
    (whole, all_rows, _), (left, fewer_rows, sizes) = found
    assert len(sizes) == 3
    assert fewer_rows < 0.9 * all_rows
    assert 0 < whole.finished_B.sum() < len(whole.finished_B)
    real_MT = np.concatenate([np.repeat(mask_BP, samples, 0), whole.mask_BR], 1) > 0
    for a, b in ((whole.tokens_BR, left.tokens_BR), (whole.mask_BR, left.mask_BR), (whole.finished_B, left.finished_B)):
        assert np.array_equal(a, b)
    assert np.abs(whole.logp_BR - left.logp_BR).max() < 1e-5
    if keep_trunk:
        assert np.abs((whole.hidden_BTD - left.hidden_BTD)[real_MT]).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "freeze_layers", "options"),
    [("llama", 0.5, {}), ("opt", 1.0, {"embed_width": 8}), ("gemma2", 0.5, {"windows": (3, 0)})],
)
def test_what_the_trunk_made_comes_along_to_the_last_token(monkeypatch, family, freeze_layers, options):
    """Prompts prefilled one at a time, or all at once."""
    arch, frozen, top, prompt_BP, mask_BP = setup(family, freeze_layers, **options)
    gen = Generation(R, eos_id=-1, pad_id=PAD)
    for tokens in (2048, 1):
        monkeypatch.setattr(sampling, "PREFILL", tokens)
        sampling.sample.clear_cache()
        drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(0), 2, True)
        tokens_MT = np.concatenate([np.repeat(prompt_BP, 2, 0), drawn.tokens_BR], 1)
        mask_MT = np.concatenate([np.repeat(mask_BP, 2, 0), drawn.mask_BR], 1)
        wanted_MTD = model.trunk(arch, frozen, tokens_MT, mask_MT)
        assert drawn.hidden_BTD.shape == (6, P + R, 16)
        assert np.abs(np.where(mask_MT[..., None] > 0, wanted_MTD - drawn.hidden_BTD, 0)).max() < 1e-4
        assert np.abs(wanted_MTD[:, -1]).min() > 0
    sampling.sample.clear_cache()


def test_nothing_comes_along_where_there_is_no_trunk():
    arch, frozen, top, prompt_BP, mask_BP = setup("opt", 0.0)
    asked = arch, Generation(R, eos_id=EOS), frozen, top, prompt_BP, mask_BP, jax.random.key(0), 2, True
    assert jax.eval_shape(partial(sample, *asked[:2]), *asked[2:7]).hidden_BTD is None


def test_tokens_outside_top_k_are_never_drawn_and_logp_is_renormalised():
    arch, frozen, top, prompt_BP, mask_BP = setup()
    gen = Generation(R, 0.9, top_k=2, eos_id=EOS, pad_id=PAD)
    drawn = sample(arch, gen, frozen, top, prompt_BP, mask_BP, jax.random.key(7), N)
    logits_MRV = forced(arch, frozen, top, prompt_BP, mask_BP, drawn) / 0.9
    tokens_MR = np.asarray(drawn.tokens_BR)
    chosen_MR = np.take_along_axis(logits_MRV, tokens_MR[..., None], -1)[..., 0]
    pair_MR2 = np.sort(logits_MRV, -1)[..., -2:]
    real_MR = np.asarray(drawn.mask_BR) > 0
    assert (chosen_MR >= pair_MR2[..., 0] - 1e-5)[real_MR].all()
    wanted_MR = chosen_MR - np.log(np.exp(pair_MR2).sum(-1))
    assert np.abs(np.asarray(drawn.logp_BR) - wanted_MR)[real_MR].max() < 1e-5


WARPS = [
    # p = .4, .3, .2, .1, in an order of their own
    ([0.2, 0.4, 0.1, 0.3], {}, [0.2, 0.4, 0.1, 0.3]),
    ([0.2, 0.4, 0.1, 0.3], {"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
    ([0.2, 0.4, 0.1, 0.3], {"temperature": 0.0}, [0, 1, 0, 0]),
    ([0.2, 0.4, 0.1, 0.3], {"top_k": 1}, [0, 1, 0, 0]),
    ([0.2, 0.4, 0.1, 0.3], {"top_k": 3}, [2 / 9, 4 / 9, 0, 3 / 9]),
    ([0.2, 0.4, 0.1, 0.3], {"top_k": 4}, [0.2, 0.4, 0.1, 0.3]),
    ([0.2, 0.4, 0.1, 0.3], {"top_k": 99}, [0.2, 0.4, 0.1, 0.3]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.001}, [0, 1, 0, 0]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.39}, [0, 1, 0, 0]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.71}, [2 / 9, 4 / 9, 0, 3 / 9]),
    ([0.2, 0.4, 0.1, 0.3], {"top_p": 0.95}, [0.2, 0.4, 0.1, 0.3]),
    # top-p counts the mass that top-k left: 4/7 of the two, not .4 of all
    ([0.2, 0.4, 0.1, 0.3], {"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
    # and after the temperature: 16/30 is the first token's mass
    ([0.2, 0.4, 0.1, 0.3], {"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    # ties with the k-th are kept; at temperature 0 the first wins
    ([0.25, 0.25, 0.4, 0.1], {"top_k": 2}, [2.5 / 9, 2.5 / 9, 4 / 9, 0]),
    ([0.3, 0.1, 0.3, 0.3], {"temperature": 0.0}, [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("p", "options", "wanted"), WARPS)
def test_warp_by_hand(p, options, wanted):
    logits_MV = jnp.log(jnp.asarray([p, p[::-1]], jnp.float32)) + jnp.asarray([[3.0], [-50.0]])
    if options == {"temperature": 0.0} and p[0] == 0.3:
        logits_MV = logits_MV[:1]  # the first of a tie, so not the mirror image
    logp_MV = np.asarray(jax.nn.log_softmax(warp(logits_MV, Generation(1, **options))), np.float64)
    rows = [wanted, wanted[::-1]][: len(logp_MV)]
    assert np.allclose(np.exp(logp_MV), rows, atol=1e-5)
    assert np.allclose(np.exp(logp_MV).sum(-1), 1, atol=1e-6)
    assert (logp_MV[np.array(rows) == 0] < -1e20).all()
