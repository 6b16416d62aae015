"""What was measured of a policy on a split, prompt by prompt, and the estimates that follow: alone and paired."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.evaluation import diversity, length_bias
from jaxrlhf.evaluation.statistics import (
    ANY,
    Estimate,
    Limits,
    around,
    blocks,
    difference_estimate,
    mean_estimates,
    pseudo,
    win_rate,
)

Place = tuple[str, ...]  # where an estimate lies in a policy's split: ("gold",), ("diversity", "per_input", "ead")
Tree = dict[str, Any]
T = TypeVar("T")
WIN_RATE: Place = ("win_rate",)
PROXY: Place = ("proxy_score",)
KL: Place = ("kl",)
GAPS: tuple[Place, ...] = (WIN_RATE, ("score",), ("gold",), PROXY)
ALL = "all"  # the split that holds all others
MOST_EVERY = 6  # policies of which every two are compared
CUT = "_cut"  # ends the name of a metric of texts that were cut to one length
LIMITS = {
    "win_rate": (0.0, 1.0),
    "length_controlled": (0.0, 1.0),
    "length": (0.0, math.inf),
    "kl": (0.0, math.inf),  # of a policy; one prompt's estimate can lie below
    "ead": (0.0, math.inf),
    "distinct": (0.0, 1.0),
    "cosine": (0.0, 1.0),
    "self_bleu": (0.0, 1.0),
    "compression": (0.0, math.inf),
    "sbert": (0.0, 2.0),
    "vendi": (1.0, math.inf),
    "nli": (0.0, 2.0),
    "clusters": (1.0, math.inf),
    "semantic_entropy": (0.0, math.inf),
}
BY_BLOCKS = ("compression", "vendi")  # across inputs, jackknifed over blocks of prompts


@dataclass
class Measured:
    """`means` hold a number of each prompt that has it; `sets` a number of all prompts, and of all without each.

    `longer` holds by how many characters a prompt's responses are longer than the reference's, on average; `by_length`
    says that it is length that decides who wins.
    """

    prompts: Sequence[Hashable]
    means: dict[Place, dict[Hashable, float]] = field(default_factory=dict)
    sets: dict[Place, tuple[float, np.ndarray]] = field(default_factory=dict)
    longer: dict[Any, float] = field(default_factory=dict)
    by_length: bool = False

    def add_mean(self, place: Place, prompts: Sequence[Hashable], value_B: Sequence[float] | np.ndarray) -> None:
        """One number of each of `prompts`."""
        self.means[place] = dict(zip(prompts, np.asarray(value_B, np.float64).tolist(), strict=True))

    def add_texts(self, texts_BN: Sequence[Sequence[str]], paper_compat: bool, cut_words: int = 0) -> None:
        """Length in words, and diversity per input (where prompts have several responses) and across inputs.

        With `cut_words`, also the diversity of the texts' first so many words.
        """
        length_B = [float(np.mean([len(t.split()) for t in responses])) for responses in texts_BN]
        self.add_mean(("length",), self.prompts, length_B)
        block_B = blocks(rank(self.prompts))
        self.add_diversity(diversity.of_texts(texts_BN, block_B, paper_compat))
        if cut_words:
            self.add_diversity(diversity.of_texts(texts_BN, block_B, paper_compat, cut_words), CUT)

    def add_diversity(self, found: diversity.Varied, suffix: str = "") -> None:
        """Metrics of the prompts' responses, under their names and `suffix`."""
        for name, value_B in found.per_input.items():
            self.add_mean(("diversity", "per_input", name + suffix), self.prompts, value_B)
        for name, value in found.across_input.items():
            self.sets["diversity", "across_input", name + suffix] = value


def in_order(items: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
    """The items in the order of `rank`: resampled so, and summed up so, they give the same numbers in any order."""
    held = list(items)
    place_B = rank([key(item) for item in held])
    return [item for _, item in sorted(zip(place_B.tolist(), held, strict=True), key=lambda pair: pair[0])]


def rank(prompts: Sequence[Hashable]) -> np.ndarray:
    """Each prompt's place in an order that looks random and hangs on the prompts alone, not on their order here."""
    keys = [(zlib.crc32(repr(p).encode("utf-8", "surrogatepass")), repr(p)) for p in prompts]
    place_B = np.empty(len(keys), np.int64)
    place_B[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return place_B


def limits(place: Place) -> Limits:
    """The least and the greatest value that a measure can take."""
    return LIMITS.get(place[-1].removesuffix(CUT), ANY)


def walk(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every estimate in a tree of objects, with where it lies."""
    if isinstance(tree, Mapping):
        if {"mean", "low", "high", "n"} <= tree.keys():
            yield place, tree
        else:
            for key, value in tree.items():
                yield from walk(value, (*place, key))


def estimates(m: Measured, resamples: int) -> Tree:
    """Everything that was measured, as estimates over prompts."""
    means = {p: _array(values.values()) for p, values in m.means.items()}
    found: Tree = {"win_rate": win_rate(means.pop(WIN_RATE))} if WIN_RATE in means else {}
    columns = means | {place: pseudo(without_B) for place, (_, without_B) in m.sets.items()}
    found |= _means([columns], resamples, lambda place: ANY if place in m.sets else limits(place))[0]
    if compared := [k for k in m.means.get(WIN_RATE, {}) if k in m.longer]:
        won_B, longer_B = (_array(held[k] for k in compared) for held in (m.means[WIN_RATE], m.longer))
        found |= length_bias.estimates(won_B, longer_B, resamples, m.by_length)
    for place, (whole, _) in m.sets.items():
        put(found, place, around(whole, at(found, place), limits(place)))
    return found


def differences(pairs: Sequence[tuple[Measured, Measured]], resamples: int) -> list[Tree]:
    """Of each pair the first minus the second, paired by prompt: what the prompts have in common cancels.

    Only the prompts that both answered count. Means are bootstrapped over the prompts' own differences. Numbers of
    whole sets are jackknifed, and only where both answered the same prompts.
    """
    shared = [{place: _array(_paired(a, b, place).values()) for place in a.means} for a, b in pairs]
    sets = [_set_differences(a, b) for a, b in pairs]
    columns = [
        held | {place: pseudo(without_B) for place, (_, without_B) in whole.items()}
        for held, whole in zip(shared, sets, strict=True)
    ]
    found = _means([{p: value_B for p, value_B in held.items() if len(value_B)} for held in columns], resamples)
    for tree, whole in zip(found, sets, strict=True):
        for place, (value, _) in whole.items():
            put(tree, place, around(value, at(tree, place)))
    return found


def _set_differences(a: Measured, b: Measured) -> dict[Place, tuple[float, np.ndarray]]:
    """Numbers of whole sets, and without each prompt, where both answered the same."""
    if set(a.prompts) != set(b.prompts):
        return {}
    where = {prompt: i for i, prompt in enumerate(b.prompts)}
    order_B = [where[prompt] for prompt in a.prompts]
    both = ((p, a.sets[p], b.sets[p]) for p in a.sets if p in b.sets)
    return {p: (whole_a - whole_b, a_B - b_B[order_B]) for p, (whole_a, a_B), (whole_b, b_B) in both}


def gap(near: Measured, far: Measured, resamples: int) -> Tree:
    """In-distribution minus out-of-distribution: two independent sets of prompts."""
    found: Tree = {}
    for place in (p for p in GAPS if p in near.means and p in far.means):
        near_B, far_B = _array(near.means[place].values()), _array(far.means[place].values())
        put(found, place, difference_estimate(near_B, far_B, resamples))
    return found


def gap_differences(a: Mapping[str, Measured], b: Mapping[str, Measured], split: str, resamples: int) -> Tree:
    """How much more a loses than b from "id" to `split`, paired within each of the two sets of prompts."""
    found: Tree = {}
    for place in GAPS:
        near, far = _paired(a["id"], b["id"], place), _paired(a[split], b[split], place)
        if near and far:
            put(found, place, difference_estimate(_array(near.values()), _array(far.values()), resamples))
    return found


def against_each_other(policies: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (a, b) whose difference is taken: every two of up to six policies, of more each beside SFT or the first.

    Every two of many would be so many comparisons at once that Holm's correction left little of any.
    """
    base = "sft" if "sft" in policies else policies[0]
    ordered = [base, *(p for p in policies if p != base)]
    return [(a, b) for b, a in combinations(ordered, 2) if b == base or len(ordered) <= MOST_EVERY]


def far(split: str) -> bool:
    """Whether prompts of a split lie away from those of the split `id`, which `all` holds too."""
    return split not in ("id", ALL)


def _paired(a: Measured, b: Measured, place: Place) -> dict[Hashable, float]:
    mine, other = a.means.get(place, {}), b.means.get(place, {})
    return {prompt: value - other[prompt] for prompt, value in mine.items() if prompt in other}


def _means(
    values: Sequence[Mapping[Place, np.ndarray]], resamples: int, within: Callable[[Place], Limits] = lambda _: ANY
) -> list[Tree]:
    where = [(i, place) for i, held in enumerate(values) for place in held]
    found: list[Tree] = [{} for _ in values]
    taken = mean_estimates([values[i][p] for i, p in where], [within(p) for _, p in where], resamples)
    for (i, place), estimate in zip(where, taken, strict=True):
        put(found[i], place, estimate)
    return found


def _array(values: Any) -> np.ndarray:
    return np.array(list(values), np.float64)


def at(tree: Tree, place: Place) -> Estimate:
    """The estimate at `place`."""
    for key in place:
        tree = tree[key]
    return tree


def put(tree: Tree, place: Place, estimate: Estimate) -> None:
    """Sets the estimate at `place`."""
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
    tree[place[-1]] = estimate
