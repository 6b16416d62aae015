from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import attention, model
from jaxrlhf.split import join, split, tree_hash

FAMILIES = tuple(model.FAMILIES)
T = 7


def architecture(family: str, **changes) -> model.Architecture:
    sizes = {"vocab_size": 19, "layers": 5, "width": 16, "heads": 4, "kv_heads": 4, "head_width": 4, "ff_width": 24}
    if model.FAMILIES[family].get("positions") != "learned":
        sizes |= {"kv_heads": 2, "head_width": 8}
    return model.Architecture(**(sizes | {"max_positions": 16} | model.FAMILIES[family] | changes))


def random_params(arch: model.Architecture, seed: int = 0):
    """Every leaf random, biases and norms too, so that a forgotten one shows."""
    shapes = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.2, 0.3, x.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnames=("arch", "freeze_layers"))
def logits(arch, params, tokens_BT, mask_BT, freeze_layers=0.4):
    frozen, top = split(params, freeze_layers)
    hidden_BTD = model.trunk(arch, frozen, tokens_BT, mask_BT)
    return model.logits(arch, frozen, top, model.run_top(arch, top, tokens_BT, hidden_BTD, mask_BT))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_depends_on_all_before_it_and_none_after(family):
    arch = architecture(family)
    blocks = random_params(arch)["blocks"]
    mask_BT = jnp.ones((1, T), jnp.float32)

    @jax.jit
    def influence(h_TD):
        def out(h_TD):
            h_BTD, _ = model.run_blocks(arch, blocks, h_TD[None], model.positions(mask_BT), model.causal(mask_BT))
            return h_BTD[0].sum(-1)

        return jnp.abs(jax.jacrev(out)(h_TD)).max(-1)

    h_TD = jnp.asarray(np.random.default_rng(0).normal(size=(T, arch.width)), jnp.float32)
    depends_TT = np.asarray(influence(h_TD)) > 0  # [position of output, position of input]
    assert np.array_equal(depends_TT, np.tril(np.ones((T, T), bool)))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_whatever_it_holds(family):
    arch = architecture(family)
    params = random_params(arch)
    rng = np.random.default_rng(1)
    plain_BT = rng.integers(0, 19, (2, T)).astype(np.int32)
    wanted_BTV = np.asarray(logits(arch, params, plain_BT, np.ones((2, T), np.float32)))
    for left in (3, 2, 0):
        for _ in range(2):
            tokens_BT = rng.integers(0, 19, (2, T + 3)).astype(np.int32)
            tokens_BT[:, left : left + T] = plain_BT
            mask_BT = np.zeros((2, T + 3), np.float32)
            mask_BT[:, left : left + T] = 1
            out_BTV = np.asarray(logits(arch, params, tokens_BT, mask_BT))
            assert np.isfinite(out_BTV).all()
            assert np.allclose(out_BTV[:, left : left + T], wanted_BTV, atol=1e-5)


def test_no_gradient_flows_from_real_positions_into_padding():
    arch = architecture("llama")
    blocks = random_params(arch)["blocks"]
    mask_BT = jnp.asarray([[0, 0, 1, 1, 1, 1, 0]], jnp.float32)

    def total(h_BTD):
        h_BTD, _ = model.run_blocks(arch, blocks, h_BTD, model.positions(mask_BT), model.causal(mask_BT))
        return (h_BTD * mask_BT[..., None]).sum()

    h_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(1, T, arch.width)), jnp.float32)
    reach_T = np.abs(np.asarray(jax.jit(jax.grad(total))(h_BTD))).max(-1)[0]
    assert np.array_equal(reach_T > 0, np.asarray(mask_BT[0] > 0))


def test_positions_count_real_tokens():
    mask_BT = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], jnp.float32)
    wanted = [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [0, 0, 1, 0, 0], [0, 1, 2, 3, 4]]
    assert model.positions(mask_BT).tolist() == wanted
    assert model.positions(mask_BT).dtype == jnp.int32


def test_causal_mask_by_hand():
    wanted = [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert model.causal(jnp.asarray([[0, 1, 1]])).astype(int).tolist() == [wanted]


def test_texts_of_a_row_and_continuations_of_a_text_by_hand():
    mask_BT = jnp.asarray([[1, 1.25, 1.5, 1.5, 2, 2, 0]])
    wanted = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert model.causal(mask_BT).astype(int).tolist() == [wanted]
    assert model.positions(mask_BT).tolist() == [[0, 1, 1, 2, 0, 1, 0]]
    assert model.before(mask_BT).tolist() == [[-1, 0, 0, 2, -1, 4, -1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_in_one_row_are_what_they_are_alone(family):
    """Two texts, the second with two continuations, and padding between nothing and nothing: also under windows."""
    arch = architecture(family)
    params = random_params(arch)
    token_T = np.random.default_rng(4).integers(0, 19, 12).astype(np.int32)
    mask_T = np.float32([1, 1, 1, 2, 2, 2, 2.25, 2.25, 2.5, 2.5, 2.5, 0])
    packed_TV = logits(arch, params, token_T[None], mask_T[None])[0]
    for own in ((1,), (2, 2.25), (2, 2.5)):
        at = np.isin(mask_T, own)
        alone_TV = logits(arch, params, token_T[at][None], np.ones((1, at.sum()), np.float32))[0]
        np.testing.assert_allclose(packed_TV[at], alone_TV, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_tokens_matters(family):
    """Attention alone cannot tell the order of the tokens before the last; positions must."""
    arch = architecture(family)
    tokens_BT = np.array([[3, 5, 7, 2, 9, 9, 4], [5, 3, 7, 2, 9, 9, 4]], np.int32)
    a_V, b_V = logits(arch, random_params(arch), tokens_BT, np.ones((2, T), np.float32))[:, -1]
    assert np.abs(a_V - b_V).max() > 1e-4  # rounding differs by 1e-6


def test_rotation_by_hand():
    """Width 4 has frequencies 1 and theta**-0.5, and pairs elements 0, 2 and 1, 3."""
    x_BTHK = jnp.asarray([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    frequency_K = model.frequencies(architecture("llama", head_width=4, rope_theta=100.0))
    turned_K = model.rotate(x_BTHK, jnp.full((1, 1), 3), frequency_K)[0, 0, 0]
    assert np.allclose(turned_K, [np.cos(3), -np.sin(0.3), np.sin(3), np.cos(0.3)], atol=1e-6)


def test_a_share_is_rotated_and_the_rest_passes():
    x_BTHK = jnp.asarray([1.0, 0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]).reshape(1, 1, 1, 8)
    frequency_K = model.frequencies(architecture("gpt_neox", head_width=8, rope_share=0.3))
    turned_K = model.rotate(x_BTHK, jnp.full((1, 1), 3), frequency_K)[0, 0, 0]
    assert np.allclose(turned_K, [np.cos(3), np.sin(3), 5, 6, 7, 8, 9, 10], atol=1e-6)


def test_scaled_frequencies_by_hand():
    """Waves of 2 pi, 20 pi, 200 pi and 2000 pi tokens, over a context of 400: 64, 6.4, .64 and .064 of them."""
    sizes = {"head_width": 8, "rope_theta": 1e4}
    plain = np.array([1.0, 1e-1, 1e-2, 1e-3])
    assert np.allclose(model.frequencies(architecture("llama", **sizes)), plain)
    linear = architecture("llama", **sizes, rope_scaling=(4.0,))
    assert np.allclose(model.frequencies(linear), plain / 4)
    llama3 = architecture("llama", **sizes, rope_scaling=(4.0, 1.0, 11.0, 400.0))
    kept = (400 * 0.1 / (2 * np.pi) - 1) / 10
    wanted = [1.0, 0.1 * (kept + (1 - kept) / 4), 1e-2 / 4, 1e-3 / 4]
    assert np.allclose(model.frequencies(llama3), wanted)


@pytest.mark.parametrize("freeze_layers", [0.0, 0.4, 1.0])
def test_each_layer_sees_its_window_wherever_the_model_is_split(freeze_layers):
    """With windows of 1 nothing moves between positions; one layer of 3 among them moves what it moves."""
    arch = architecture("mistral", windows=(1, 1, 1, 3, 1))
    frozen, top = split(random_params(arch), freeze_layers)
    mask_BT = jnp.ones((1, T), jnp.float32)

    @jax.jit
    def influence(token_BT):
        hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
        return model.run_top(arch, top, token_BT, hidden_BTD, mask_BT)[0]

    token_BT = np.zeros((1, T), np.int32)
    plain_TD = influence(token_BT)
    for t in range(T):
        changed_BT = token_BT.copy()
        changed_BT[0, t] = 1
        moved_T = np.abs(influence(changed_BT) - plain_TD).max(-1) > 0
        assert np.flatnonzero(moved_T).tolist() == [i for i in range(T) if t <= i < t + 3]


@pytest.mark.parametrize(
    ("family", "freeze_layers", "options"),
    [
        ("gemma2", 0.0, {"windows": (0, 2)}),
        ("gpt_neox", 1.0, {}),
        ("opt", 0.5, {"norm_place": "post", "final_norm": False}),
    ],
)
def test_picked_positions_have_the_states_and_gradients_of_whole_sequences(family, freeze_layers, options):
    """The last block's keys and values are of all positions, its queries and the rest of the picked ones alone."""
    arch = architecture(family, layers=2, **options)
    frozen, top = split(random_params(arch), freeze_layers)
    rng = np.random.default_rng(7)
    token_BT = jnp.asarray(rng.integers(0, 19, (3, T)), jnp.int32)
    mask_BT = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]], jnp.float32)
    weight_BQD = jnp.asarray(rng.normal(size=(3, 2, arch.width)), jnp.float32)
    rows, columns = np.array([[0], [1], [2]]), np.array([[2, 6], [4, 4], [5, 1]])

    @partial(jax.jit, static_argnames=("early",))
    @partial(jax.value_and_grad, has_aux=True)
    def picked(top, early):
        hidden_BTD = model.trunk(arch, frozen, token_BT, mask_BT)
        pick = lambda x: x[rows, columns]  # noqa: E731
        final_BQD = model.run_top(arch, top, token_BT, hidden_BTD, mask_BT, pick if early else None)
        final_BQD = final_BQD if early else pick(final_BQD)
        return (final_BQD * weight_BQD).sum(), final_BQD

    (_, wanted_BQD), wanted = picked(top, early=False)
    (_, found_BQD), found = picked(top, early=True)
    assert np.allclose(found_BQD, wanted_BQD, atol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.allclose(a, b, atol=1e-4 * max(1, np.abs(b).max(initial=0)))


def test_soft_caps_by_hand():
    assert np.allclose(attention.softcap(jnp.asarray([-1e9, 0.0, 1.5]), 3.0), [-3, 0, 3 * np.tanh(0.5)])
    assert attention.softcap(1e9, 0.0) == 1e9  # pyright: ignore


def test_attention_against_loops():
    rng = np.random.default_rng(3)
    B, S, H, G, K = 2, 5, 4, 2, 3
    q, k, v = (rng.normal(size=(B, S, n, K)).astype(np.float32) for n in (H, G, G))
    mask_BT = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]], np.float32)
    arch = architecture("gemma2", query_scalar=5, attn_softcap=0.7)
    out_BTHK = np.asarray(attention.attention(arch, q, k, v, model.causal(jnp.asarray(mask_BT))))  # pyright: ignore
    for b in range(B):
        for t in np.flatnonzero(mask_BT[b]):
            seen = [s for s in range(t + 1) if mask_BT[b, s]]
            for h in range(H):
                weight = np.exp([0.7 * np.tanh(q[b, t, h] @ k[b, s, h // 2] / np.sqrt(5) / 0.7) for s in seen])
                wanted = sum(w * v[b, s, h // 2] for w, s in zip(weight, seen, strict=True)) / weight.sum()
                assert np.allclose(out_BTHK[b, t, h], wanted, atol=1e-5)


@pytest.mark.parametrize("length", [64, 150, 300])
def test_attention_in_parts_is_that_of_the_whole_matrix(length):
    """Of three texts, one padded on the left and one on the right; values and gradients."""
    rng = np.random.default_rng(length)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, length, n, 4)), jnp.float32) for n in (4, 2, 2, 4))
    mask_BT = np.ones((2, length), np.float32)
    mask_BT[0, :9], mask_BT[1, length // 3 :], mask_BT[1, -70:] = 0, 2, 0
    arch, seen_BTS = architecture("llama"), model.causal(jnp.asarray(mask_BT))
    real_BT11 = (mask_BT > 0)[..., None, None]

    def whole(q, k, v):
        score = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, 2, 2)) / np.sqrt(arch.head_width)
        weight = jax.nn.softmax(jnp.where(seen_BTS[:, None], score, -jnp.inf), -1)
        return jnp.einsum("bhts,bshk->bthk", weight, jnp.repeat(v, 2, 2))

    def valued(f):
        return jax.jit(jax.value_and_grad(lambda *x: (jnp.where(real_BT11, f(*x), 0) * weight).sum(), (0, 1, 2)))

    found, wanted = valued(lambda *x: attention.attention(arch, *x, seen_BTS))(q, k, v), valued(whole)(q, k, v)
    assert len(attention._parts(length)) == {64: 1, 150: 3, 300: 3}[length]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


OPT_350M = {"norm_place": "post", "final_norm": False, "embed_width": 8}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tied": False}),
        ("opt", {}),
        ("opt", OPT_350M),
        ("opt", OPT_350M | {"tied": False}),
        ("gemma2", {"windows": (2, 0, 2, 0, 2)}),
        ("gpt_neox", {}),
    ],
)
def test_logits_do_not_depend_on_where_the_model_is_split(family, options):
    arch = architecture(family, **options)
    params = random_params(arch)
    tokens_BT = np.random.default_rng(4).integers(0, 19, (3, T)).astype(np.int32)
    mask_BT = (np.arange(T) >= np.array([[0], [3], [6]])).astype(np.float32)
    whole, *rest = (np.asarray(logits(arch, params, tokens_BT, mask_BT, f)) for f in (0.0, 0.4, 0.8, 1.0))
    for out in rest:
        assert np.allclose(out, whole, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("freeze_layers", "below"), [(0.0, 0), (0.1, 0), (0.4, 2), (0.5, 2), (0.8, 4), (1.0, 5)])
def test_split_rounds_down_and_join_undoes_it(freeze_layers, below, tied):
    params = random_params(architecture("llama", tied=tied))
    frozen, top = split(params, freeze_layers)
    assert {x.shape[0] for x in jax.tree.leaves(frozen.blocks)} == {below}
    assert {x.shape[0] for x in jax.tree.leaves(top.blocks)} == {5 - below}
    assert bool(frozen.embed) == (freeze_layers > 0) == (not top.embed)
    assert bool(frozen.lm_head) == (freeze_layers > 0 and not tied)
    assert bool(top.lm_head) == (freeze_layers == 0 and not tied)
    assert tree_hash(join(frozen, top)) == tree_hash(params)


def test_hash_tells_values_names_types_and_shapes_apart():
    params = random_params(architecture("llama"))
    frozen = split(params, 0.8)[0]
    same = split(jax.tree.map(lambda x: np.array(x), params), 0.8)[0]
    assert tree_hash(frozen) == tree_hash(same)
    changed = jax.tree.map(lambda x: np.array(x), frozen)
    changed.blocks["q"]["kernel"][-1, -1, -1, -1] = np.nextafter(changed.blocks["q"]["kernel"][-1, -1, -1, -1], 9)
    kernel = np.zeros((2, 3), np.float32)
    trees = [
        frozen,
        changed,
        split(params, 0.6)[0],
        {"a": kernel},
        {"b": kernel},
        {"a": kernel.T},
        {"a": kernel.view(np.int32)},
    ]
    assert len({tree_hash(t) for t in trees}) == len(trees)


def test_only_the_top_gets_gradients_and_all_of_it_does():
    arch = architecture("opt")
    frozen, top = split(random_params(arch), 0.6)
    tokens_BT = np.random.default_rng(5).integers(0, 19, (2, T)).astype(np.int32)
    mask_BT = np.ones((2, T), np.float32)
    hidden_BTD = model.trunk(arch, frozen, tokens_BT, mask_BT)  # pyright: ignore

    @jax.jit
    @jax.grad
    def gradient(top):
        final_BTD = model.run_top(arch, top, tokens_BT, hidden_BTD, mask_BT)  # pyright: ignore
        return jax.nn.log_softmax(model.logits(arch, frozen, top, final_BTD))[..., 0].sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(top)):
        name = jax.tree_util.keystr(path)
        if name != ".blocks['k']['bias']":  # shifts every score of a query alike, which the softmax forgets
            assert np.abs(leaf).reshape(leaf.shape[0], -1).max() > 1e-4, name
