import random
import re

import pytest

from jaxrlhf.data.duplicates import near


def words(seed, count):
    draw = random.Random(seed)
    return [f"w{draw.randrange(40)}" for _ in range(count)]


def jaccard(a, b):
    """The definition, on texts of 8 words or more."""
    one, other = (
        {tuple(w[i : i + 8]) for i in range(len(w) - 7)} for w in (re.findall(r"\w+", t.lower()) for t in (a, b))
    )
    return len(one & other) / len(one | other)


def test_against_the_definition():
    references = [" ".join(words(i, 30 + 3 * i)) for i in range(12)]
    candidates = []
    for i, text in enumerate(references):
        changed = text.split()
        for j in range(i % 4):
            changed[7 * j + 3] = "new"
        candidates.append(" ".join(changed[i % 3 :]))
    for threshold in (0.2, 0.5, 0.8, 1.0):
        wanted = {}
        for i, c in enumerate(candidates):
            best = max(range(12), key=lambda j, c=c: jaccard(c, references[j]))
            if jaccard(c, references[best]) >= threshold:
                wanted[i] = (best, pytest.approx(jaccard(c, references[best])))
        assert near(candidates, references, threshold) == wanted
    assert 2 <= len(near(candidates, references, 0.8)) < len(near(candidates, references, 0.2))


def test_by_hand():
    """Of 12 words, 5 eights; one changed at the end leaves 4 of them, and 6 in all."""
    text = "a b c d e f g h i j k l"
    assert near([text[:-1] + "x"], [text], 0.6) == {0: (0, pytest.approx(4 / 6))}
    assert near([text[:-1] + "x"], [text], 0.67) == {}


def test_case_spaces_and_punctuation_do_not_count_and_short_texts_must_be_equal():
    assert near(["One, TWO -- three!", "one two", "?!", ""], ["zero", "one two three", "?!"], 0.8) == {
        0: (1, 1.0),
        2: (2, 1.0),
    }
    assert near([], ["a"], 0.8) == {}
    assert near(["a"], [], 0.8) == {}


def test_a_word_that_repeats_does_not_hide_the_count_of_words():
    assert near(["a a", "a " * 9], ["a", "a a a", "a " * 20], 0.8) == {1: (2, 1.0)}  # one set of eight a's


def test_the_first_of_equal_references_is_named():
    text = " ".join(words(1, 20))
    assert near([text], ["other", text, text], 0.8) == {0: (1, 1.0)}
