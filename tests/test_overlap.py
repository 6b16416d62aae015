import math
import zlib
from collections import Counter

import numpy as np
import pytest

from jaxrlhf.evaluation.diversity import by_blocks, of_texts
from jaxrlhf.evaluation.ngrams import cut
from jaxrlhf.evaluation.overlap import compression, self_bleu
from jaxrlhf.evaluation.statistics import blocks, jackknife, over_items

TEXTS = [
    "the cat sat on the mat today and slept",
    "the cat sat on a mat",
    "dogs bark at the cat on the mat every day",
    "the the the the",
    "naïve café 日本 the cat",
    "so",
]


def bleu(text, others):
    """BLEU-4 with method 1's smoothing, over plain lists, as its papers have it."""
    words, references = text.split(), [o.split() for o in others]

    def grams(ws, n):
        return Counter(tuple(ws[i : i + n]) for i in range(len(ws) - n + 1))

    logs = []
    for n in range(1, min(4, len(words)) + 1):
        own = grams(words, n)
        hits = sum(min(c, max(grams(r, n)[g] for r in references)) for g, c in own.items())
        if n == 1 and not hits:
            return 0.0
        logs.append(math.log((hits or 0.1) / sum(own.values())))
    if not words:
        return 0.0
    nearest = min((abs(len(r) - len(words)), len(r)) for r in references)[1]
    return math.exp(sum(logs) / len(logs) + min(0, 1 - nearest / len(words)))


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], [*TEXTS, ""], ["a b", "c d"], ["", "", "a"], TEXTS[:3] * 2])
def test_self_bleu_is_the_mean_of_bleu_against_the_others(texts):
    wanted = 1 - np.mean([bleu(t, texts[:i] + texts[i + 1 :]) for i, t in enumerate(texts)])
    assert self_bleu(texts) == pytest.approx(wanted, abs=1e-12)
    assert self_bleu(texts[::-1]) == pytest.approx(wanted, abs=1e-12)


def test_self_bleu_by_hand():
    # Each text has 2 of 3 words, 1 of 2 pairs and no triple (.1 of 1) in the other, which is as long.
    assert self_bleu(["a b c", "a b d"]) == pytest.approx(1 - (2 / 3 * 1 / 2 * 0.1) ** (1 / 3), abs=1e-12)
    # "a" is all in "a b c", but a third as long; "a b c" has one word of three there, and no pair or triple.
    short, long = math.exp(1 - 3), (1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3)
    assert self_bleu(["a", "a b c"]) == pytest.approx(1 - (short + long) / 2, abs=1e-12)
    assert self_bleu(["same words here"] * 3) == pytest.approx(0, abs=1e-12)
    assert self_bleu(["a b", "c d"]) == self_bleu(["", ""]) == 1
    assert self_bleu(["alone"]) == self_bleu([]) == 0


def test_compression_is_of_the_sorted_lines():
    data = "a line\nb line\nc 日本".encode()
    assert compression(["c 日本", "a line", "b line"]) == len(zlib.compress(data, 6)) / len(data)
    rng = np.random.default_rng(0)
    varied = [" ".join(map(str, rng.integers(0, 10**6, 20))) for _ in range(16)]
    assert compression(varied[:1] * 16) < 0.15 < 0.4 < compression(varied) < 1
    assert compression([]) == compression([""]) == 0
    assert compression(["\ud800 a lone surrogate"]) > 0


def test_cut_keeps_the_first_words_as_they_are_written():
    assert cut(" one\ttwo\n\nthree  four ", 3) == " one\ttwo\n\nthree"
    assert cut("one two  ", 2) == "one two  "  # has no more words: stays as it is
    assert [cut(t, 1) for t in ("", "  ", "日本 語")] == ["", "  ", "日本"]


def test_texts_that_differ_after_the_cut_alone_are_alike():
    texts = [["a b c d e x", "a b c d e y z"], ["a b c d e v", "a b c d e"]]
    whole, short = (of_texts(texts, np.arange(2), False, k) for k in (0, 5))
    assert whole.per_input.keys() == short.per_input.keys() == whole.across_input.keys() == short.across_input.keys()
    for name in ("cosine", "self_bleu"):
        assert short.per_input[name] == pytest.approx([0, 0], abs=1e-12)
        assert whole.per_input[name].min() > 0.05
    assert of_texts([["a"], ["b"]], np.arange(2), False).per_input == {}


def test_blocks_of_one_item_are_the_jackknife_itself():
    texts = [[t] for t in TEXTS]
    whole, without = of_texts(texts, blocks(np.arange(6)), False).across_input["compression"]
    assert whole == compression(TEXTS)
    assert without == pytest.approx([compression(TEXTS[:b] + TEXTS[b + 1 :]) for b in range(6)], abs=1e-12)
    assert by_blocks(np.zeros(1, np.int64), lambda b: [7.0]) == (7.0, [7.0])


def test_blocks_have_equal_sizes_and_follow_the_rank():
    assert blocks(np.array([3, 0, 2, 1])).tolist() == [3, 0, 2, 1]
    assert np.bincount(blocks(np.random.default_rng(0).permutation(40))).tolist() == [4] * 10


def test_intervals_from_blocks_are_about_as_wide_as_from_items():
    rng = np.random.default_rng(1)
    widths = []
    for _ in range(200):
        x = rng.normal(size=100)
        block_B = blocks(rng.permutation(100))
        without_G = np.array([x[block_B != g].mean() for g in range(10)])
        e = jackknife(x.mean(), over_items(without_G, block_B))
        widths.append((e["high"] - e["low"]) / 2)
    assert e["n"] == 100
    # The error of a mean of 100 is 1/10; Student's quantile for 9 degrees of freedom, times the mean of s (.973 sigma).
    assert np.mean(widths) == pytest.approx(2.262 * 0.1 * 0.973, rel=0.06)
