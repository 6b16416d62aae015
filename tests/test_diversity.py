import json
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.evaluation import diversity
from jaxrlhf.evaluation.diversity import across_input, distinct, ead, ngram_cosine, ngrams, per_input, words

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")


def outputs(model):
    return json.loads((DATA / "alpaca_eval" / "outputs" / f"{model}.json").read_text())


def golden():
    return json.loads((DATA / "golden" / "released_code_diversity.json").read_text())


def test_released_word_splitting():
    assert words("U.S. is 3.5\nmiles  wide.", paper_compat=True) == ["US", "is", "35miles", "wide"]


def test_default_word_splitting_keeps_words_apart_in_any_script():
    assert words("line\nnext, don't 3.5 日本 ¿qué?") == [
        "line", "next", ",", "don't", "3", ".", "5", "日本", "¿", "qué", "?",
    ]  # fmt: skip
    assert words("") == []


def test_distinct_by_hand():
    grams = [ngrams("a b a", True), ngrams("a b c", True)]
    # n=1: {a,b,c} of 6; n=2: ab,ba,ab,bc -> 3 of 4; n=3: aba,abc -> 2 of 2; n=4,5: none -> 0
    assert distinct(grams) == pytest.approx((3 / 6 + 3 / 4 + 1 + 0 + 0) / 5, abs=1e-12)


def test_ead_by_hand():
    grams = [ngrams("a b a", True), ngrams("a b c", True)]
    v = 50257

    def adjusted(kinds, count):
        return kinds / (v * (1 - ((v - 1) / v) ** count))

    assert ead(grams) == pytest.approx((adjusted(3, 6) + adjusted(3, 4) + adjusted(2, 2)) / 5, abs=1e-12)


def test_cosine_by_hand():
    grams = [ngrams(t, True) for t in ("a b c d", "a b c x", "")]
    # 3-grams abc,bcd against abc,bcx: cosine 1/2; the empty text is like no other: pairs 1/2, 1, 1
    assert ngram_cosine(grams) == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-12)
    assert ngram_cosine([grams[0]]) == 0
    assert ngram_cosine([grams[0]] * 3) == pytest.approx(0, abs=1e-12)


def test_across_input_without_a_prompt_equals_measuring_the_rest():
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(list("abcdef"), rng.integers(0, 9))) for _ in range(3)] for _ in range(7)]
    grams = [[ngrams(t) for t in row] for row in texts]
    found = across_input(grams)
    for name, function in (("ead", ead), ("distinct", distinct), ("cosine", ngram_cosine)):
        value, without = found[name]
        assert value == pytest.approx(np.mean([function([row[j] for row in grams]) for j in range(3)]), abs=1e-12)
        for b in range(7):
            rest = grams[:b] + grams[b + 1 :]
            assert without[b] == pytest.approx(np.mean([function([r[j] for r in rest]) for j in range(3)]), abs=1e-12)


def test_order_of_prompts_and_samples_does_not_matter_per_input():
    grams = [[ngrams(t) for t in row] for row in (["a b c", "a b", "c"], ["x y", "x y z", ""])]
    turned = [row[::-1] for row in grams[::-1]]
    for name, values in per_input(grams).items():
        assert values == pytest.approx(per_input(turned)[name][::-1], abs=1e-12)


@needs_data
def test_released_values_across_inputs():
    for model, wanted in golden()["across_input"].items():
        grams = [ngrams(r["output"], paper_compat=True) for r in outputs(model)]
        assert ead(grams) == pytest.approx(wanted["ead"], abs=1e-9)
        assert distinct(grams) == pytest.approx(wanted["distinct"], abs=1e-9)


@needs_data
def test_released_values_per_input():
    wanted = golden()["per_input"]
    answers = [{r["instruction"]: r["output"] for r in outputs(m)} for m in wanted["models"]]
    prompts = [r["instruction"] for r in outputs("text_davinci_003")[:100]]
    found = diversity.per_input([[ngrams(a[p], paper_compat=True) for a in answers] for p in prompts])
    for ours, theirs in (("ead", "ead"), ("distinct", "distinct"), ("cosine", "ngram_cosine")):
        assert found[ours] == pytest.approx(wanted[theirs], abs=1e-9)
