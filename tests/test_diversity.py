import json
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.evaluation.diversity import across_input, distinct, ead, ngram_cosine, per_input
from jaxrlhf.evaluation.ngrams import count, words
from jaxrlhf.evaluation.overlap import self_bleu

GOLDEN = json.loads((Path(__file__).parent / "golden" / "diversity_released.json").read_text(encoding="utf-8"))
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")
FUNCTIONS = {"ead": ead, "distinct": distinct, "cosine": ngram_cosine, "self_bleu": self_bleu}


def outputs(model):
    return json.loads((DATA / "alpaca_eval" / "outputs" / f"{model}.json").read_text())


def golden():
    return json.loads((DATA / "golden" / "released_code_diversity.json").read_text())


def counted(texts, paper_compat=False):
    return count([t for row in texts for t in row], paper_compat), len(texts), len(texts[0])


def random_texts(seed, prompts, samples):
    rng = np.random.default_rng(seed)
    return [[" ".join(rng.choice(list("abcdef"), rng.integers(0, 9))) for _ in range(samples)] for _ in range(prompts)]


def test_released_word_splitting():
    assert words("U.S. is 3.5\nmiles  wide.", paper_compat=True) == ["US", "is", "35miles", "wide"]


def test_default_word_splitting_keeps_words_apart_in_any_script():
    assert words("line\nnext, don't 3.5 日本 ¿qué?") == [
        "line", "next", ",", "don't", "3", ".", "5", "日本", "¿", "qué", "?",
    ]  # fmt: skip
    assert words("") == []
    assert distinct(["Yes yes"]) == distinct(["no yes"]) > distinct(["yes yes"])


def test_distinct_by_hand():
    # n=1: {a,b,c} of 6; n=2: ab,ba,ab,bc -> 3 of 4; n=3: aba,abc -> 2 of 2; n=4,5: none -> 0
    assert distinct(["a b a", "a b c"]) == pytest.approx((3 / 6 + 3 / 4 + 1 + 0 + 0) / 5, abs=1e-12)


def test_ead_by_hand():
    v = 50257

    def adjusted(kinds, total):
        return kinds / (v * (1 - ((v - 1) / v) ** total))

    assert ead(["a b a", "a b c"]) == pytest.approx((adjusted(3, 6) + adjusted(3, 4) + adjusted(2, 2)) / 5, abs=1e-12)


def test_ead_can_exceed_one():
    assert ead([" ".join(map(str, range(50_000)))]) > 1.5


def test_cosine_by_hand():
    # 3-grams abc,bcd against abc,bcx: cosine 1/2; the empty text is like no other: pairs 1/2, 1, 1
    assert ngram_cosine(["a b c d", "a b c x", ""]) == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-12)
    assert ngram_cosine(["a b c d"]) == 0
    assert ngram_cosine(["a b c d"] * 3) == pytest.approx(0, abs=1e-12)
    # "a a a a" has aaa twice, "a a a b" aaa and aab: 2 / (2 * sqrt 2)
    assert ngram_cosine(["a a a a", "a a a b"]) == pytest.approx(1 - 2**-0.5, abs=1e-12)


def test_n_grams_do_not_run_over_the_end_of_a_text():
    assert distinct(["a b", "a b"]) == pytest.approx((2 / 4 + 1 / 2) / 5, abs=1e-12)
    assert [len(g.gram_M) for g in count(["a b", "", "c", "d e f"])] == [6, 3, 1, 0, 0]


def test_no_text_and_no_words_are_zero():
    for texts in ([], [""], ["", " \n"]):
        assert ead(texts) == distinct(texts) == 0
    assert ngram_cosine([]) == 0


@pytest.mark.parametrize("name", GOLDEN)
def test_released_formulas_on_made_up_texts(name):
    case = GOLDEN[name]
    for metric in ("ead", "distinct", "cosine"):
        assert FUNCTIONS[metric](case["texts"], paper_compat=True) == pytest.approx(case[metric], abs=1e-12)


def test_per_input_is_each_prompts_own_set():
    texts = random_texts(1, 9, 4)
    for name, values in per_input(*counted(texts)).items():
        assert values == pytest.approx([FUNCTIONS[name](row) for row in texts], abs=1e-12)


def test_across_input_without_a_prompt_equals_measuring_the_rest():
    texts = random_texts(0, 7, 3)
    texts[5] = texts[2]  # a repeat takes no n-gram away with it
    found = across_input(*counted(texts))
    for name, function in FUNCTIONS.items():
        value, without, _ = found[name]
        assert value == pytest.approx(np.mean([function([row[j] for row in texts]) for j in range(3)]), abs=1e-12)
        for b in range(7):
            rest = texts[:b] + texts[b + 1 :]
            assert without[b] == pytest.approx(np.mean([function([r[j] for r in rest]) for j in range(3)]), abs=1e-12)


def test_order_of_prompts_and_samples_does_not_matter():
    texts = random_texts(2, 5, 3)
    here, there = counted(texts), counted([row[::-1] for row in texts[::-1]])
    for name, values in per_input(*here).items():
        assert values == pytest.approx(per_input(*there)[name][::-1], abs=1e-12)
        assert across_input(*here)[name][0] == pytest.approx(across_input(*there)[name][0], abs=1e-12)


def test_what_two_texts_alone_share_by_hand():
    """b and "a b" are in the first and last text alone: without both go 1 of 6 words and 1 of 3 bigrams more."""
    found = across_input(*counted([["a b"], ["a c"], ["a b"]]))
    assert found["distinct"].pairs == pytest.approx(((1 / 6 + 1 / 3) / 5) ** 2)
    # Two responses: of the second set nothing is shared, and each set counts half.
    found = across_input(*counted([["a b", "d"], ["a c", "e"], ["a b", "f"]]))
    assert found["distinct"].pairs == pytest.approx(((1 / 6 + 1 / 3) / 10) ** 2)


@needs_data
def test_released_values_across_inputs():
    for model, wanted in golden()["across_input"].items():
        grams = count([r["output"] for r in outputs(model)], paper_compat=True)
        found = across_input(grams, wanted["n_prompts"], 1)
        assert found["ead"][0] == pytest.approx(wanted["ead"], abs=1e-9)
        assert found["distinct"][0] == pytest.approx(wanted["distinct"], abs=1e-9)


@needs_data
def test_released_values_per_input():
    wanted = golden()["per_input"]
    answers = [{r["instruction"]: r["output"] for r in outputs(m)} for m in wanted["models"]]
    prompts = [r["instruction"] for r in outputs("text_davinci_003")[:100]]
    found = per_input(*counted([[a[p] for a in answers] for p in prompts], paper_compat=True))
    for ours, theirs in (("ead", "ead"), ("distinct", "distinct"), ("cosine", "ngram_cosine")):
        assert found[ours] == pytest.approx(wanted[theirs], abs=1e-9)
