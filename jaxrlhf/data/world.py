"""The embedded world: the paper's summarisation task in miniature, made from one seed.

A forum post tells six facts (who, act, object, place, feeling, question), perhaps with asides about somebody else. A
simulated person summarises it well or badly; `world_gold` judges any summary exactly. The in-distribution posts are
about relationships, with positive feelings; each other split changes one thing, as the paper's splits of TL;DR do, and
the news are the counterpart of CNN/DailyMail.

Record i of a kind and split is a pure function of (seed, kind, split, i). All values are strings. Prompts end with
"TL;DR:" (pretraining documents with "COMMENT:"), and responses start with a space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jaxrlhf.data.world_gold import gold, gold_parts, prefers_first
from jaxrlhf.data.world_words import (
    ASIDES,
    COMMENTS,
    HEDGES,
    JOBS,
    NEGATIVE,
    PETS,
    POSITIVE,
    RELATIONSHIPS,
    SCHOOL,
    SIGN_OFFS,
    SLOTS,
    TOPICS,
    VOCABULARY,
    WORLD_NEWS,
    Concept,
    Topic,
    summaries,
)

__all__ = [
    "KINDS",
    "SPLITS",
    "VOCABULARY",
    "demonstration",
    "document",
    "gold",
    "gold_parts",
    "post",
    "prefers_first",
]

COMMENT_WORDS = 23  # with the end-of-text token, the 24 tokens of a response
SPLITS = ("id", "ood_subreddit", "ood_length", "ood_sentiment", "ood_news")
KINDS = ("preference", "ppo", "validation", "evaluation")

# The first number of every random stream. Changing one changes that kind's records and no other's.
_STREAMS = {"document": 0, "demonstration": 1, "preference": 2, "ppo": 3, "validation": 4, "evaluation": 5}
_SPLIT_TOPICS = {"ood_subreddit": (JOBS, PETS, SCHOOL), "ood_news": (WORLD_NEWS,)}

T = TypeVar("T")
Facts = dict[str, Concept]
# Uniform in [0, 1). Nothing else is drawn: numpy may change how it makes other distributions from the same bits.
Draw = Callable[[], float]


@dataclass(frozen=True)
class _Post:
    topic: Topic
    concepts: dict[str, tuple[Concept, ...]]  # what any slot could have said in a post of this kind
    facts: Facts
    asides: tuple[Facts, ...]  # about somebody else: two to four slots each, all different from `facts`
    text: str  # ends before the last line


def document(seed: int, i: int) -> dict[str, str]:
    """Pretraining: a post of any topic and feeling, then a comment that copies its facts in short sentences."""
    draw = _stream(seed, "document", "id", i)
    topic = RELATIONSHIPS if draw() < 0.3 else _pick(draw, TOPICS)
    made = _post(draw, topic, POSITIVE if draw() < 0.5 else NEGATIVE, n_asides=int(draw() < 0.5))
    return {"id": f"document-{i}", "prompt": f"{made.text}\nCOMMENT:", "response": f" {_comment(draw, made)}"}


def demonstration(seed: int, i: int) -> dict[str, str]:
    """SFT: an in-distribution post with an imperfect human summary; `facts` as in `post`."""
    return _record(seed, "demonstration", "id", i)


def post(seed: int, kind: str, split: str, i: int) -> dict[str, str]:
    """A post of `KINDS` and `SPLITS`, with a human reference as its response.

    Returns:
      `id`, `prompt`, `response`, and `facts`: what `gold` needs, a JSON object from slot to concept.

    Raises:
      ValueError: unknown kind or split, or training posts (preference, ppo) asked for out of distribution.
    """
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(f"no posts of kind {kind!r} and split {split!r}; kinds: {KINDS}, splits: {SPLITS}")
    if kind in ("preference", "ppo") and split != "id":
        raise ValueError(f"{kind} posts are training data and exist in split 'id' only, not {split!r}")
    return _record(seed, kind, split, i)


def _record(seed: int, kind: str, split: str, i: int) -> dict[str, str]:
    draw = _stream(seed, kind, split, i)
    topic = _pick(draw, _SPLIT_TOPICS[split]) if split in _SPLIT_TOPICS else RELATIONSHIPS
    n_asides = 3 + int(draw() < 0.5) if split == "ood_length" else int(draw() < 0.5)
    made = _post(draw, topic, NEGATIVE if split == "ood_sentiment" else POSITIVE, n_asides)
    return {
        "id": f"{kind}-{split}-{i}",
        "prompt": f"{made.text}\nTL;DR:",
        "response": f" {_summarise(draw, made)}",
        "facts": json.dumps({slot: concept[0] for slot, concept in made.facts.items()}),
    }


def _stream(seed: int, kind: str, split: str, i: int) -> Draw:
    return np.random.default_rng([seed, _STREAMS[kind], SPLITS.index(split), i]).random


def _post(draw: Draw, topic: Topic, feelings: tuple[Concept, ...], n_asides: int) -> _Post:
    """Six independent facts, `n_asides` sentences about somebody else, and the text that tells both."""
    concepts = topic.concepts | {"feeling": feelings}
    facts = {slot: _pick(draw, concepts[slot]) for slot in SLOTS}
    style = topic.style
    body = [_fill(draw, _pick(draw, part), topic, facts) for part in (style.events, style.feelings, style.questions)]
    asides: list[Facts] = []
    for _ in range(n_asides):
        template = _pick(draw, ASIDES)
        other = {slot: _other(draw, concepts[slot], facts[slot]) for slot in SLOTS if f"{{{slot}}}" in template}
        sentence = f"{_pick(draw, style.asides)} {_fill(draw, template, topic, other)}"
        body.insert(int(draw() * len(body)), sentence)  # never last: the question ends the story
        asides.append(other)
    if draw() < 0.25:
        body.insert(0, _pick(draw, style.openers))
    if draw() < 0.25:
        body.append(_pick(draw, style.closers))
    told = " ".join(body)
    if style.titles:
        title = _fill(draw, _pick(draw, style.titles), topic, facts)
        text = f"SUBREDDIT: r/{topic.name}\nTITLE: {title}\nPOST: {told}"
    else:
        text = f"ARTICLE: {told}"
    return _Post(topic, concepts, facts, tuple(asides), text)


def _comment(draw: Draw, made: _Post) -> str:
    """Different short sentences in random order, as many as a summary has room for, some of them hedged or signed."""
    said = [_pick(draw, HEDGES)] if draw() < 0.2 else []
    after = [_pick(draw, SIGN_OFFS)] if draw() < 0.2 else []
    for template in _shuffled(draw, COMMENTS):
        sentence = _fill(draw, template, made.topic, made.facts)
        if len(" ".join([*said, sentence, *after]).split()) > COMMENT_WORDS:
            break
        said.append(sentence)
    return " ".join([*said, *after])


def _summarise(draw: Draw, made: _Post) -> str:
    """A demonstrator of random skill q ~ Beta(4, 2) forgets facts, mixes some up, and pads the rest."""
    q = sorted(draw() for _ in range(5))[3]  # the fourth smallest of five uniforms is Beta(4, 2)
    kept = {slot: made.facts[slot] for slot in SLOTS if draw() < 0.45 + 0.55 * q}
    if not kept:
        kept = {"who": made.facts["who"]}
    told = {slot: _mixed_up(draw, made, slot) if draw() < 0.22 * (1 - q) else kept[slot] for slot in kept}
    summary = _fill(draw, _pick(draw, summaries(frozenset(told))), made.topic, told)
    before = [_pick(draw, HEDGES)] if draw() < 0.6 * (1 - q) else []
    after = [_pick(draw, SIGN_OFFS)] if draw() < 0.6 * (1 - q) else []
    return " ".join([*before, summary, *after])


def _mixed_up(draw: Draw, made: _Post, slot: str) -> Concept:
    """A wrong concept for the slot: what an aside said, in 7 of 10 cases where one said it, else anything else."""
    heard = [aside[slot] for aside in made.asides if slot in aside]
    if heard and draw() < 0.7:
        return _pick(draw, heard)
    return _other(draw, made.concepts[slot], made.facts[slot])


def _fill(draw: Draw, template: str, topic: Topic, facts: Facts) -> str:
    """The template with the style's voice, and any synonym of each concept."""
    return template.format_map(topic.style.voice | {slot: _pick(draw, concept) for slot, concept in facts.items()})


def _other(draw: Draw, concepts: tuple[Concept, ...], this: Concept) -> Concept:
    return _pick(draw, [concept for concept in concepts if concept != this])


def _pick(draw: Draw, options: Sequence[T]) -> T:
    return options[int(draw() * len(options))]


def _shuffled(draw: Draw, options: Sequence[T]) -> list[T]:
    return [option for _, option in sorted(((draw(), option) for option in options), key=lambda pair: pair[0])]
