"""The paper's findings, each as one number of a run whose sign decides it over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.evaluation.figures import label
from jaxrlhf.evaluation.measures import CUT, WIN_RATE, Place, walk
from jaxrlhf.evaluation.statistics import Estimate, over_seeds

Results = Mapping[str, Any]
Setting = Mapping[str, str]
Seed = Sequence[tuple[Setting, Results]]  # one seed's points
Value = Callable[[Seed, Place], float]
KL_COEF = "ppo.kl_coef"
PER_INPUT, ACROSS = ("diversity", "per_input", "ead"), ("diversity", "across_input", "ead")
# Win rate and EAD decide, as in the paper; the others stand beside them.
PERFORMANCE: tuple[Place, ...] = (WIN_RATE, ("gold",), ("score",))
RULE = (
    "Confirmed where the 95 % interval over seeds of the number lies on the side that the finding says, contradicted "
    "where it lies on the other, undecided where it holds 0. Findings are judged one by one, without a correction for "
    "how many there are."
)


class Claim(NamedTuple):
    """What the paper found, the number that says so, and the sign it then has."""

    text: str
    number: str
    sign: int
    value: Value
    places: tuple[Place, ...]


def judged(runs: Sequence[Seed], base: Setting) -> list[dict[str, Any]]:
    """Each claim that the points of several seeds allow: {"claim", "number", "sign", "verdict", "measured"}.

    "measured" holds the estimates over seeds, by measure; the first of them decides. Points of `base` are the ones that
    speak for PPO; with a sweep of its KL coefficient, the least and the greatest speak for the last claim.
    """
    runs = [[*(p for p in seed if p[0] == base), *(p for p in seed if p[0] != base)] for seed in runs]
    runs = [seed for seed in runs if seed and seed[0][0] == base]
    found = []
    for claim in CLAIMS:
        measured = {}
        for place in claim.places:
            try:
                values = [claim.value(seed, place) for seed in runs]
            except (KeyError, ValueError, ZeroDivisionError):
                continue  # not measured by every seed, or a share of no diversity
            if len(values) > 1:
                measured[label(place)] = over_seeds(values)
        if measured:
            decides = next(iter(measured.values()))
            told = {"claim": claim.text, "number": claim.number, "sign": claim.sign}
            found.append(told | {"verdict": verdict(decides, claim.sign), "measured": measured})
    return found


def verdict(e: Estimate, sign: int) -> str:
    """What an estimate says of a claim about its sign, as `RULE` has it."""
    if e["low"] <= 0 <= e["high"]:
        return "undecided"
    return "confirmed" if e["mean"] * sign > 0 else "contradicted"


def _at(run: Results, policy: str, split: str, place: Place) -> float:
    return dict(walk(run["policies"][policy][split]))[place]["mean"]


def _over_splits(run: Results, policy: str, place: Place, far: bool = False) -> float:
    splits = [s for s in run["policies"]["sft"] if not far or s != "id"]
    return sum(_at(run, policy, s, place) for s in splits) / len(splits)


def _less(a: str, b: str, far: bool = False) -> Value:
    return lambda seed, place: _over_splits(seed[0][1], a, place, far) - _over_splits(seed[0][1], b, place, far)


def _farther(seed: Seed, place: Place) -> float:
    near = _at(seed[0][1], "ppo", "id", place) - _at(seed[0][1], "sft", "id", place)
    return _less("ppo", "sft", far=True)(seed, place) - near


def _shares(seed: Seed, place: Place) -> float:
    """How much larger a share per input than across inputs PPO keeps of SFT's, in logs."""
    kept = [
        math.log(_over_splits(seed[0][1], "ppo", p, False) / _over_splits(seed[0][1], "sft", p, False))
        for p in (place, ("diversity", "across_input", place[2]))
    ]
    return kept[0] - kept[1]


def _bought_back(seed: Seed, place: Place) -> float:
    """PPO's diversity at the greatest coefficient less that at the least, less half of what the least lost to SFT."""
    by_coef = sorted((float(setting[KL_COEF]), i) for i, (setting, _) in enumerate(seed))
    if by_coef[0][0] == by_coef[-1][0]:
        raise KeyError(KL_COEF)
    low, high = (seed[by_coef[i][1]][1] for i in (0, -1))
    least = _over_splits(low, "ppo", place)
    return _over_splits(high, "ppo", place) - least - 0.5 * (_over_splits(low, "sft", place) - least)


def _both(place: Place) -> tuple[Place, ...]:
    return (place, (*place[:2], place[2] + CUT))


CLAIMS = (
    Claim(
        "RLHF does better than SFT out of distribution",
        "PPO less SFT, mean of the splits out of distribution",
        1,
        _less("ppo", "sft", far=True),
        PERFORMANCE,
    ),
    Claim(
        "the more so the farther: RLHF's lead over SFT is larger out of distribution than in distribution",
        "PPO's lead over SFT out of distribution, mean of the splits, less its lead in distribution",
        1,
        _farther,
        PERFORMANCE,
    ),
    Claim(
        "RLHF's answers to one input are less diverse than SFT's",
        "PPO less SFT, mean of all splits",
        -1,
        _less("ppo", "sft"),
        _both(PER_INPUT),
    ),
    Claim(
        "RLHF's answers across inputs are less diverse than SFT's",
        "PPO less SFT, mean of all splits",
        -1,
        _less("ppo", "sft"),
        _both(ACROSS),
    ),
    Claim(
        "the loss is above all per input",
        "log of the share of SFT's that PPO keeps per input, less that across inputs",
        -1,
        _shares,
        _both(PER_INPUT),
    ),
    Claim(
        "best-of-N keeps more diversity per input than RLHF",
        "best-of-N less PPO, mean of all splits",
        1,
        _less("bon", "ppo"),
        _both(PER_INPUT),
    ),
    Claim(
        "a larger KL coefficient does not buy the diversity back",
        "what PPO has more at the greatest coefficient than at the least, less half of what the least lost to SFT",
        -1,
        _bought_back,
        _both(PER_INPUT),
    ),
)
