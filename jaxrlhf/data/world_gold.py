"""The embedded world's judges: the known gold reward, and annotators who compare by it with noise."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re

import numpy as np

from jaxrlhf.data.world_words import sentences, slot_words

MOST = 4  # wrong facts, repeats and broken bigrams count up to here, so that no sample is an outlier
FREE_WORDS = 16  # punctuation counts as words; sentences that tell all six facts take at least 17


def gold(facts: str, response: str, finished: bool) -> float:
    """The known reward of a summary: the sum of `gold_parts`; well told, all six facts earn 5.85."""
    return math.fsum(gold_parts(facts, response, finished).values())


def gold_parts(facts: str, response: str, finished: bool) -> dict[str, float]:
    """The terms whose sum is the gold reward.

    facts covered (0 to 6) - wrong facts (at most 4) - .5 repeats (at most 4) - .15 max(0, words - 16)
    - 1.5 [not finished] - .5 broken bigrams (at most 4).

    A fact is covered when any synonym of its concept occurs; any other concept of the world is wrong, whether an aside
    told it or nobody did. A repeat is one more mention of a concept. A bigram is broken when no sentence of the world
    holds it, the words of a slot being one class; unknown words and line breaks are in none.

    Args:
      facts: the post's `facts`, a JSON object from slot to concept.
      response: any text; split at spaces.
      finished: the response ended by itself (with an end-of-text token), not by the length limit.

    Returns:
      `facts`, `wrong`, `repeats`, `length`, `unfinished` and `grammar`, signed.
    """
    true = set(json.loads(facts).items())
    words = re.findall(r"\n|\S+", response)
    known = slot_words()
    mentions = [known[word] for word in words if word in known]
    told = set(mentions)
    return {
        "facts": float(len(told & true)),
        "wrong": -float(min(MOST, len(told - true))),
        "repeats": -0.5 * min(MOST, len(mentions) - len(told)),
        "length": -0.15 * max(0, len(words) - FREE_WORDS),
        "unfinished": 0.0 if finished else -1.5,
        "grammar": -0.5 * min(MOST, _broken(words, finished)),
    }


def prefers_first(gold_a: float, gold_b: float, temperature: float, rng: np.random.Generator) -> bool:
    """One annotator's choice: True with P = sigmoid((gold_a - gold_b) / temperature), for a temperature above 0.

    Source: Bradley and Terry, 1952.
    """
    # As tanh, because exp overflows at large differences.
    return bool(rng.random() < 0.5 + 0.5 * math.tanh((gold_a - gold_b) / temperature / 2.0))


def _broken(words: list[str], finished: bool) -> int:
    """How many bigrams of the response no sentence holds; an unfinished one may stop anywhere."""
    classes = _classes(words)
    allowed = _bigrams()
    # An empty response says nothing, which its facts already show.
    stops_badly = finished and len(words) > 0 and classes[-1] != ""
    return sum(pair not in allowed for pair in itertools.pairwise(classes)) + stops_badly


def _classes(words: list[str]) -> list[str]:
    """The slot of each fact word, "{who}", and any other word itself; "" before and after every sentence."""
    known = slot_words()
    classes = [""]
    for word in words:
        classes.append(f"{{{known[word][0]}}}" if word in known else word)
        if word in (".", "?"):
            classes.append("")
    return classes


@functools.cache
def _bigrams() -> frozenset[tuple[str, str]]:
    """All pairs of neighbouring classes in the sentences of the world."""
    return frozenset(pair for text in sentences() for pair in itertools.pairwise(_classes(text.split())))
