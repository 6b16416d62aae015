import json
from itertools import combinations

import numpy as np
import pytest
from encoder_directories import TINY, change_json, copy_of

from jaxrlhf.evaluation import encoders, results, semantic
from jaxrlhf.evaluation.semantic import Responses, meanings, of_clusters, of_embeddings, of_sentences, sbert, vendi
from jaxrlhf.evaluation.statistics import blocks
from jaxrlhf.files import UserError


def unit(seed, *shape):
    array = np.random.default_rng(seed).normal(size=shape) + 0.4
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def lookup(table, asked=None):
    """An NLI model that knows some pairs; equal sentences entail each other, others are neutral."""

    def read(pairs):
        if asked is not None:
            asked.extend(pairs)
        return np.array([table.get((a, b), int(a == b)) for a, b in pairs], np.int64)

    return read


def both(a, b, value):
    return {(a, b): value, (b, a): value}


def nli(texts_BN, table, paper_compat=False):
    responses = Responses(texts_BN, np.arange(len(texts_BN)))
    return of_sentences({0: responses}, lookup(table), paper_compat)[0]


def test_sbert_is_the_mean_over_pairs():
    unit_ND = unit(0, 7, 5)
    wanted = np.mean([1 - unit_ND[i] @ unit_ND[j] for i, j in combinations(range(7), 2)])
    assert sbert(unit_ND) == pytest.approx(wanted, abs=1e-12)
    assert sbert(unit_ND[:1]) == 0
    assert sbert(np.repeat(unit_ND[:1], 4, 0)) == pytest.approx(0, abs=1e-12)
    assert sbert(np.array([[1.0, 0], [-1, 0]])) == 2


@pytest.mark.parametrize(("n", "width"), [(6, 9), (9, 6), (1, 4)])
def test_vendi_is_the_exponential_of_the_kernels_entropy(n, width):
    unit_ND = unit(1, n, width)
    value = np.linalg.eigvals(unit_ND @ unit_ND.T / n).real
    value = value[value > 1e-9]
    assert vendi(unit_ND) == pytest.approx(np.exp(-np.sum(value * np.log(value))), rel=1e-9)


def test_vendi_counts_different_texts():
    assert vendi(np.eye(5)) == pytest.approx(5)
    assert vendi(np.eye(5)[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2)
    assert vendi(np.eye(5)[[3, 3, 3]]) == pytest.approx(1)


def test_embeddings_across_inputs_without_a_prompt_equal_measuring_the_rest():
    unit_BND = unit(2, 6, 3, 4)
    found = of_embeddings(unit_BND, np.arange(6))
    for name, function in (("sbert", sbert), ("vendi", vendi)):
        value, without_B = found.across_input[name]
        assert value == pytest.approx(np.mean([function(unit_BND[:, j]) for j in range(3)]), abs=1e-12)
        for b in range(6):
            rest = np.delete(unit_BND, b, 0)
            assert without_B[b] == pytest.approx(np.mean([function(rest[:, j]) for j in range(3)]), abs=1e-12)
        assert found.per_input[name] == pytest.approx([function(row) for row in unit_BND], abs=1e-12)
    assert of_embeddings(unit_BND[:, :1], np.arange(6)).per_input == {}
    assert len(np.unique(blocks(np.arange(6)))) == 6


def test_sentences_are_not_characters():
    assert semantic.sentences("One here. Two, U.K.! 3.5 is three?\nfour") == [
        "One here.",
        "Two, U.K.!",
        "3.5 is three?",
        "four",
    ]
    assert semantic.sentences("一つ。二つ！三") == ["一つ。", "二つ！", "三"]
    assert semantic.sentences(" \n") == []
    long = " ".join(f"Number {i}." for i in range(30))
    drawn = semantic.sentences(long)
    assert len(drawn) == 5
    assert drawn == semantic.sentences(long) == sorted(drawn, key=lambda s: int(s[7:-1]))
    assert drawn != [f"Number {i}." for i in range(5)]
    assert set(semantic.sentences("ab", paper_compat=True)) == {"a", "b"}
    assert all(len(c) == 1 for c in semantic.sentences(long, paper_compat=True))


def test_nli_by_hand():
    # a-b: one sentence pair contradicts both ways, the other is neutral: -1/2; a-c: entailment one way: 1/2; b-c: 0
    a, b, c = "It rains. Cats sleep.", "It is dry. Dogs run. Birds sing.", "It rains hard."
    table = both("It rains.", "It is dry.", -1) | {("It rains hard.", "It rains."): 1}
    found = nli([[a, b, c]], table)
    assert found.per_input["nli"] == pytest.approx([1 - (-1 / 2 + 1 / 2 + 0) / 3], abs=1e-12)
    assert nli([[a, a]], {}).per_input["nli"] == [0]
    assert nli([["x.", "y."]], both("x.", "y.", -1)).per_input["nli"] == [2]
    assert nli([["x.", "y."]], {}).per_input["nli"] == nli([["", "y."]], {}).per_input["nli"] == [1]
    assert nli([["x."]], {}).per_input == {}


def test_nli_as_described_of_the_released_code():
    """Sign turned, both ways added, divided by 5 once more: alike 1.4, contradictory .6 (without the 5: 3 and -1)."""
    assert nli([["x", "x"]], {}, paper_compat=True).per_input["nli"] == pytest.approx([1.4])
    assert nli([["x", "y"]], both("x", "y", -1), paper_compat=True).per_input["nli"] == pytest.approx([0.6])
    assert nli([["x", "y"]], {}, paper_compat=True).per_input["nli"] == [1]
    # Pairs of characters weigh alike, whichever texts they come from: 2 alike of 2, and 0 of 1 and 1.
    found = nli([["ab", "ab", "c"]], {}, paper_compat=True).per_input["nli"]
    assert found == pytest.approx([1 + 2 * (2 / 4) / 5])


def test_nli_across_inputs_without_a_prompt_equals_measuring_the_pairs_that_are_left():
    texts = [[f"x{b}.", f"y{b}. z{b}."] for b in range(40)]
    rng = np.random.default_rng(3)
    names = [s for row in texts for t in row for s in t.split()]
    table = {(p, q): int(rng.integers(-1, 2)) for p in names for q in names}
    responses = Responses(texts, rng.permutation(40))
    whole, without_B = of_sentences({0: responses}, lookup(table), False)[0].across_input["nli"]
    met = semantic._neighbours(responses.rank_B, semantic.MEETINGS // 2)
    assert len(met) == 40 * 8
    assert np.bincount(met.ravel()).tolist() == [16] * 40

    def likeness(a, b):
        pairs = list(zip(a.split(), b.split(), strict=True))
        return np.mean([table[p, q] + table[q, p] for p, q in pairs]) / 2

    def value(kept):
        return np.mean([1 - np.mean([likeness(texts[i][n], texts[j][n]) for i, j in kept]) for n in range(2)])

    assert whole == pytest.approx(value(met), abs=1e-12)
    for b in range(40):
        assert without_B[b] == pytest.approx(value([p for p in met if b not in p]), abs=1e-12)


def test_nli_reads_each_pair_once_and_in_any_order():
    texts = [["a. b.", "b. a.", "c."], ["a. b.", "c.", ""]]
    asked = []
    table = both("a.", "c.", -1) | both("b.", "c.", 1)
    read = lookup(table, asked)
    here = of_sentences({0: Responses(texts, np.array([0, 1])), 1: Responses(texts, np.array([1, 0]))}, read, False)[0]
    assert len(asked) == len(set(asked))
    there = of_sentences({0: Responses([r[::-1] for r in texts[::-1]], np.array([1, 0]))}, lookup(table), False)[0]
    assert here.per_input["nli"] == pytest.approx(there.per_input["nli"][::-1], abs=1e-12)
    assert here.across_input["nli"][0] == pytest.approx(there.across_input["nli"][0], abs=1e-12)


def test_meanings_join_where_entailment_goes_both_ways():
    table = both("a", "b", 1) | {("a", "c"): 1} | both("c", "d", 1)
    groups = [["d", "a", "c", "b", "a"], ["x", "x"], ["x", "y"], [""]]
    assert meanings(groups, lookup(table)) == [[3, 2], [2], [1, 1], [1]]
    assert meanings([g[::-1] for g in groups], lookup(table)) == [[3, 2], [2], [1, 1], [1]]
    # Greedy: c is like b, not like the first of b's cluster, a.
    assert meanings([["a", "b", "c"]], lookup(both("a", "b", 1) | both("b", "c", 1))) == [[2, 1]]
    found = of_clusters([[3, 2], [2], [1, 1, 1, 1]])
    assert found["clusters"].tolist() == [2, 1, 4]
    entropy = -(0.6 * np.log(0.6) + 0.4 * np.log(0.4))
    assert found["semantic_entropy"] == pytest.approx([entropy, 0, np.log(4)], abs=1e-12)


def test_labels_are_found_by_name():
    assert semantic.likeness_of(["ENTAILMENT", "contradiction", "Neutral"], "m").tolist() == [1, -1, 0]
    with pytest.raises(UserError, match=r"m: its labels are LABEL_0, LABEL_1; an NLI model's are entailment, neutral"):
        semantic.likeness_of(["LABEL_0", "LABEL_1"], "m")


def write(path, name, outputs):
    rows = [{"instruction": f"q{i}", "output": o, "dataset": d} for i, (o, d) in enumerate(outputs)]
    (path / f"{name}.json").write_text(json.dumps(rows))
    return f"{name}={path / f'{name}.json'}"


OUTPUTS = [
    (["the cat sat. a dog ran.", "a dog ran", ""], "k"),
    (["the cat sat. a dog ran.", "naïve café!", "x"], "v"),
    (["a dog ran", "a dog ran", "the mat"], "k"),
]


def evaluate(tmp_path, outputs, **models):
    return results.evaluate_outputs(outputs, "", [], False, tmp_path / "out", print, 50, **models)


MODELS = {"sentence_encoder": str(TINY / "bert_sentence"), "nli_model": str(TINY / "roberta_classifier")}


def test_models_add_their_metrics_to_the_results(tmp_path):
    found = evaluate(tmp_path, [write(tmp_path, "m", OUTPUTS)], **MODELS)["policies"]["m"]["all"]["diversity"]
    assert {"sbert", "vendi", "nli", "clusters", "semantic_entropy"} <= found["per_input"].keys()
    assert {"sbert", "vendi", "nli"} == found["across_input"].keys() & {"sbert", "vendi", "nli", "clusters"}
    for scope, most in (("per_input", 3), ("across_input", 3)):
        assert 0 < found[scope]["sbert"]["mean"] < 2
        assert 1 <= found[scope]["vendi"]["mean"] <= most
        assert 0 <= found[scope]["nli"]["mean"] <= 2
    none = evaluate(tmp_path, [write(tmp_path, "m", OUTPUTS)])["policies"]["m"]["all"]["diversity"]["per_input"]
    assert not {"sbert", "vendi", "nli", "clusters"} & none.keys()


def test_numbers_do_not_hang_on_order_or_batches(tmp_path, monkeypatch):
    here = evaluate(tmp_path, [write(tmp_path, "m", OUTPUTS)], **MODELS)["policies"]["m"]["k"]["diversity"]
    monkeypatch.setattr(encoders, "CHUNK", 2)
    turned = [(texts[::-1], d) for texts, d in OUTPUTS]
    there = evaluate(tmp_path, [write(tmp_path, "m", turned)], **MODELS)["policies"]["m"]["k"]["diversity"]
    for scope in here:
        for name in ("sbert", "vendi", "nli"):
            assert here[scope][name]["mean"] == pytest.approx(there[scope][name]["mean"], abs=1e-6)
    assert here["per_input"]["clusters"] == there["per_input"]["clusters"]


def test_each_text_is_encoded_once_over_all_policies_and_splits(tmp_path, monkeypatch):
    seen = []
    embed = encoders.embed

    def counting(encoder, texts, **options):
        seen.extend(texts)
        return embed(encoder, texts, **options)

    monkeypatch.setattr(encoders, "embed", counting)
    files = [write(tmp_path, "m", OUTPUTS), write(tmp_path, "n", OUTPUTS[::-1])]
    evaluate(tmp_path, files, sentence_encoder=MODELS["sentence_encoder"])
    assert sorted(seen) == sorted({t for texts, _ in OUTPUTS for t in texts})


def test_models_that_do_not_fit_are_named(tmp_path):
    files = [write(tmp_path, "m", OUTPUTS)]
    with pytest.raises(UserError, match=r"nowhere"):
        evaluate(tmp_path, files, sentence_encoder=str(tmp_path / "nowhere"))
    model = copy_of("bert_classifier", tmp_path)
    change_json(model / "config.json", {"id2label": {"0": "yes", "1": "no", "2": "maybe"}})
    with pytest.raises(UserError, match=r"config.json: its labels are yes, no, maybe"):
        evaluate(tmp_path, files, nli_model=str(model))
    assert not (tmp_path / "out").exists()
