"""The diversity of all policies and splits: what is measured, cut to which length, and how it hangs on length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.evaluation import diversity
from jaxrlhf.evaluation.measures import CUT, Measured, limits, rank
from jaxrlhf.evaluation.statistics import jackknife, mean_estimate, narrowed
from jaxrlhf.logs import progress

T = TypeVar("T")
Policies = Mapping[str, Mapping[str, Measured]]  # policy -> split
Texts = Mapping[str, Mapping[str, Sequence[Sequence[str]]]]  # policy -> split -> [B][N]
LEAST = 20  # prompts of a policy in a row across inputs: a few would cut all other policies to as few


@dataclass(frozen=True)
class Options:
    """What to measure: directories of models, "" for none, and the words that texts are cut to, 0 for our choice."""

    paper_compat: bool = False
    cut_words: int = 0
    sentence_encoder: str = ""
    nli_model: str = ""


def add(measured: Policies, texts: Texts, options: Options) -> dict[str, dict[str, dict[str, float]]]:
    """Adds length and diversity to what was measured.

    Returns policy -> split -> {"words", "reached"}: the length that texts were cut to, the same for all policies of a
    split, and the share of texts that have so many words; the others stayed as they are.
    """
    held = [(policy, split) for policy, splits in texts.items() for split in splits]
    words = {key: np.array([len(t.split()) for row in texts[key[0]][key[1]] for t in row]) for key in held}
    cuts: dict[str, dict[str, dict[str, float]]] = {policy: {} for policy in texts}
    for policy, split in _bar(held, "measuring diversity"):
        most = options.cut_words or cut_length([words[k] for k in held if k[1] == split])
        measured[policy][split].add_texts(texts[policy][split], options.paper_compat, most)
        cuts[policy][split] = {"words": most, "reached": float((words[policy, split] >= most).mean())}
    if options.sentence_encoder or options.nli_model:
        # Only here: it imports what the other metrics have no use for.
        from jaxrlhf.evaluation import semantic

        responses = {(p, s): semantic.Responses(texts[p][s], rank(measured[p][s].prompts)) for p, s in held}
        found = semantic.measure(responses, options.sentence_encoder, options.nli_model, options.paper_compat)
        for (policy, split), parts in found.items():
            for part in parts:
                measured[policy][split].add_diversity(part)
    return cuts


def cut_length(words: Sequence[np.ndarray]) -> int:
    """The words to cut to: the least over policies of their texts' lower quartile, at least 1.

    Three quarters of each policy's texts or more then have exactly as many words; a shorter cut would make all alike in
    length and see less of what they say.
    """
    return max(1, min(int(np.quantile(w, 0.25)) for w in words))


def by_length(
    measured: Policies, resamples: int, texts: Texts | None = None, paper_compat: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Diversity of prompts with short, middling and long responses, by split.

    The limits are the terciles of the prompts' mean lengths over all policies, so that a row compares policies at like
    lengths; a policy without prompts there is absent from it. Per input; of one response a prompt, whose `texts` it
    takes, across inputs. As that hangs on the number of prompts, a row then takes as many of each policy: as the one
    with the fewest there has, of those with at least 20.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    splits = dict.fromkeys(s for splits in measured.values() for s in splits)
    for split in _bar(list(splits), "measuring diversity by length"):
        every = {p: splits[split] for p, splits in measured.items() if split in splits}
        if own := {p: m for p, m in every.items() if _own(m)}:
            found[split] = [
                {"scope": "per_input", "words": words}
                | {"policies": {p: _means(own[p], index, resamples) for p, index in inside.items()}}
                for words, inside in _thirds(own)
            ]
        elif texts:
            rows = [(words, _as_many(every, inside)) for words, inside in _thirds(every)]
            found[split] = [
                {"scope": "across_input", "words": words}
                | {
                    "policies": {
                        p: _across(every[p], texts[p][split], index, resamples, paper_compat)
                        for p, index in inside.items()
                    }
                }
                for words, inside in rows
                if inside
            ]
    return {split: rows for split, rows in found.items() if rows}


def _thirds(held: Mapping[str, Measured]) -> Iterator[tuple[list[float], dict[str, np.ndarray]]]:
    """The least and greatest length of each third of all policies' prompts, and which of each policy's are in it."""
    lengths = {p: np.array(list(m.means["length",].values())) for p, m in held.items()}
    pooled = np.sort(np.concatenate(list(lengths.values())))
    edges = np.quantile(pooled, [1 / 3, 2 / 3], method="lower")
    third = {p: np.searchsorted(edges, length_B) for p, length_B in lengths.items()}
    for part in range(3):
        within = pooled[np.searchsorted(edges, pooled) == part]
        if len(within):
            inside = {p: np.flatnonzero(third[p] == part) for p in held if (third[p] == part).any()}
            yield [float(within[0]), float(within[-1])], inside


def _as_many(held: Mapping[str, Measured], inside: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each policy as many prompts as of the others, in an order that hangs on the prompts alone."""
    enough = {p: index for p, index in inside.items() if len(index) >= LEAST}
    most = min(map(len, enough.values()), default=0)
    return {p: index[np.argsort(rank(held[p].prompts)[index])[:most]] for p, index in enough.items()}


def _across(
    m: Measured, texts: Sequence[Sequence[str]], index: np.ndarray, resamples: int, paper_compat: bool
) -> dict[str, Any]:
    length = mean_estimate(np.array(list(m.means["length",].values()))[index], resamples)
    counted = diversity.count([texts[int(b)][0] for b in index], paper_compat)
    return {"length": length} | {
        name: jackknife(a.value, narrowed(a.without_B, a.pairs), limits(("diversity", "across_input", name)), resamples)
        for name, a in diversity.across_input(counted, len(index), 1).items()
    }


def _own(m: Measured) -> list[str]:
    return [p[2] for p in m.means if p[:2] == ("diversity", "per_input") and not p[2].endswith(CUT)]


def _means(m: Measured, index: np.ndarray, resamples: int) -> dict[str, Any]:
    places = {"length": ("length",)} | {name: ("diversity", "per_input", name) for name in _own(m)}
    return {n: mean_estimate(np.array(list(m.means[p].values()))[index], resamples) for n, p in places.items()}


def _bar(jobs: Sequence[T], title: str) -> Iterator[T]:
    """The jobs, with a bar where they take more than two seconds."""
    with progress(title, len(jobs), delay=2) as bar:
        for job in jobs:
            yield job
            bar.update()
