"""Structured splits, random subsets and held-out shares: pure functions of records, of the config, and of a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrlhf.config_data import Datasets
from jaxrlhf.data.datasets import body
from jaxrlhf.files import UserError

HELD_OUT = ("test", "validation")
KINDS = ("full", "subreddit", "length", "sentiment")
# The paper's subreddits: summarisation_formatting.py:24.
SUBREDDITS = ("relationships", "relationship_advice", "AskReddit", "tifu", "dating_advice")


def in_distribution(c: Datasets, labels: Mapping[str, bool] | None = None) -> Callable[[Mapping[str, str]], bool]:
    """Whether a record belongs to the part that training sees; the rest is out of distribution.

    `subreddit`: the record's is one of `c.subreddits`. `length`: its body has at most `c.length` words, counted as what
    single spaces part (PROTOCOL Aa, summarisation_formatting.py:80). `sentiment`: `labels` says so, by the record's id.

    Raises:
      UserError: `c.split` is unknown; of a record, that it has no subreddit or no label.
    """

    def by_subreddit(record: Mapping[str, str]) -> bool:
        if not record.get("subreddit"):
            raise UserError("config.datasets.split='subreddit': the records have no field 'subreddit'")
        return record["subreddit"] in c.subreddits

    def by_sentiment(record: Mapping[str, str]) -> bool:
        assert labels is not None
        if record["id"] not in labels:
            raise UserError(f"config.datasets.sentiment_index: it has no label for the record {record['id']!r}")
        return labels[record["id"]]

    if c.split not in KINDS:
        raise UserError(f"config.datasets.split={c.split!r}: known are {', '.join(KINDS)}")
    return {
        "full": lambda record: True,
        "subreddit": by_subreddit,
        "length": lambda record: len(body(record).split(" ")) <= c.length,
        "sentiment": by_sentiment,
    }[c.split]


def subset(count: int, share: float, seed: int, with_replacement: bool = False) -> list[int]:
    """Which of `count` records a random share takes, in order.

    Without replacement, a smaller share of the same records and seed is part of a larger one. With it, as the released
    code draws (PROTOCOL D28): numpy's generator seeded with the percentage, and records that come twice.

    Raises:
      UserError: the share is not above 0 and at most 1, or with replacement not 0.1 or 0.5.
    """
    if not 0 < share <= 1:
        raise UserError(f"config.datasets.subset={share}: a share above 0 and at most 1")
    if with_replacement:
        if share not in (0.1, 0.5):
            raise UserError(f"config.datasets.subset={share}: with replacement the released code has 0.1 and 0.5 only")
        drawn = np.random.default_rng(round(100 * share)).integers(0, count, count // round(1 / share))
        return drawn.tolist()
    ranked = sorted(range(count), key=lambda i: place(f"subset {seed}", str(i)))
    return sorted(ranked[: max(round(count * share), 1)])


def held_out(keys: Sequence[str], share: float, seed: int, names: Sequence[str]) -> dict[str, list[int]]:
    """Records by split: `train`, and a share for each of `names`, which are `test`, `validation` or both.

    Records with one key go to one split, of whatever dataset they are.
    """
    found: dict[str, list[int]] = {"train": [], **{name: [] for name in names}}
    for i, key in enumerate(keys):
        where = int(place(f"held out {seed}", key) / share)
        name = HELD_OUT[where] if where < len(HELD_OUT) else "train"
        found[name if name in names else "train"].append(i)
    return found


def limited(keys: Sequence[str], at_most: int, seed: int) -> list[int]:
    """At most so many records (0 = all), spread over the set; fewer are part of more."""
    if not 0 < at_most < len(keys):
        return list(range(len(keys)))
    ranked = sorted(range(len(keys)), key=lambda i: (place(f"limit {seed}", keys[i]), i))
    return sorted(ranked[:at_most])


def place(what: str, text: str) -> float:
    """A number in [0, 1) that depends on the two alone."""
    return int.from_bytes(hashlib.sha256(f"{what}/{text}".encode()).digest()[:8]) / 2**64
