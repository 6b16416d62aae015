"""A sweep's results: its base's, and each policy's numbers over the values swept, and at best-of-N's KL."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.evaluation import claims, results, samples, seeds
from jaxrlhf.evaluation.measures import CUT, KL, PROXY, WIN_RATE, Measured, Place, Tree, in_order, limits, put, walk
from jaxrlhf.evaluation.statistics import Estimate, mean_estimate, over_seeds
from jaxrlhf.files import read_json, write_json

BY_NUMBERS = ("gold", "reward")  # judges whose verdicts are in the samples
COMPARED: tuple[Place, ...] = (WIN_RATE, ("gold",), ("score",), PROXY, ("diversity", "per_input", "ead"))
Setting = Mapping[str, str]


class Ran(NamedTuple):
    """A point of a sweep that is complete."""

    name: str
    setting: Setting
    seed_key: str
    folder: Path


def best_of_n_bound(n: int) -> float:
    """KL(best-of-n || policy) in nats where no two samples tie, log n - (n - 1) / n; where some do, it is above the KL.

    Stiennon et al. 2020 (app. G.3) take it for the KL; Beirami et al. 2024 prove that it is an upper bound.
    """
    return math.log(n) - (n - 1) / n


def write(ran: Sequence[Ran], settings: Sequence[Setting], failed: Mapping[str, str], workdir: Path) -> dict[str, Any]:
    """Writes results.json of a sweep from its points' own; `settings` are all that were swept, the base first.

    It is that of the base, or of the first setting that ran, over seeds where several were swept, and beside it
    "tradeoff": {"axes", "base", "points", "equal_kl", "failed"}. A point there is a policy under a setting that changed
    it. With several seeds also "claims", the paper's findings, of the base alone. Where a seed leaves a policy as it
    is, as PPO's leaves SFT, its numbers, and those of two such policies beside each other, are one run's own, over
    prompts.
    """
    distinct = [s for i, s in enumerate(settings) if s not in settings[:i]]
    by_setting = [runs for s in distinct if (runs := [r for r in ran if r.setting == s])]
    read = {r.name: read_json(r.folder / "results.json") for r in ran}
    base = by_setting[0]
    found = dict(read[base[0].name])
    if len(base) > 1:
        found = seeds.combine([read[r.name] for r in base], base[0].seed_key)
        _restore(found, read[base[0].name], _same(base, list(read[base[0].name]["policies"])))
    found["tradeoff"] = {
        "axes": {key: list(dict.fromkeys(s[key] for s in settings)) for key in settings[0]},
        "base": dict(base[0].setting),
        "points": [p for runs in by_setting for p in _points(runs, base, read)],
        "equal_kl": _equal_kl(by_setting, read),
        "failed": dict(failed),
    }
    if len(base) > 1 and base[0].seed_key == "seed":
        found["claims"] = claims.judged(
            [[(r.setting, read[r.name]) for r in runs] for runs in _by_seed(ran, read)], settings[0]
        )
    write_json(workdir / "results.json", found)
    return found


def _same(runs: Sequence[Ran], policies: Sequence[str]) -> set[str]:
    """The policies of which all runs have the same samples."""
    return {p for p in policies if len({(r.folder / "samples" / p).resolve() for r in runs}) == 1}


def _restore(found: dict[str, Any], run: Mapping[str, Any], same: set[str]) -> None:
    """Puts one run's own numbers of policies that are the same in all runs where means over seeds stand."""
    for section in ("policies", "generalisation_gap"):
        found[section] |= {p: splits for p, splits in run[section].items() if p in same}
    for section in ("differences", "comparisons"):
        own = {(d["a"], d["b"], d["split"]): d for d in run[section] if {d["a"], d["b"]} <= same}
        found[section] = [own.get((d["a"], d["b"], d["split"]), d) for d in found[section]]


def _by_seed(ran: Sequence[Ran], read: Mapping[str, Any]) -> list[list[Ran]]:
    found: dict[Any, list[Ran]] = {}
    for r in ran:
        found.setdefault(_seed(r, read), []).append(r)
    return list(found.values())


def _seed(r: Ran, read: Mapping[str, Any]) -> Any:
    return seeds.value(read[r.name]["config"], r.seed_key) if r.seed_key else 0


def _points(runs: Sequence[Ran], base: Sequence[Ran], read: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each policy of one setting that is not the base's own."""
    theirs = {(r.folder / "samples" / p).resolve() for r in base for p in read[r.name]["policies"]}
    for policy in read[runs[0].name]["policies"]:
        mine = [(r.folder / "samples" / policy).resolve() for r in runs]
        if runs[0].setting != base[0].setting and all(folder in theirs for folder in mine):
            continue
        told = [read[r.name]["policies"][policy] for r in (runs[:1] if _same(runs, [policy]) else runs)]
        point = {"policy": policy, "setting": dict(runs[0].setting), "runs": len(told)}
        if policy == "bon":
            point["kl_bound"] = best_of_n_bound(read[runs[0].name]["sampling"]["bon"]["best_of"])
        yield point | {"splits": {s: _over(list(m)) for s in told[0] if all(m := [t.get(s) for t in told])}}


def _over(measured: Sequence[Tree]) -> Tree:
    """Every number over the runs that measured it; of one run its own, over prompts."""
    found: Tree = {}
    held = [dict(walk(m)) for m in measured]
    for place in held[0]:
        if place[0] == "win_rate_by_length" or place[-1].endswith(CUT) or not all(place in h for h in held):
            continue
        es = [h[place] for h in held]
        put(found, place, es[0] if len(es) == 1 else over_seeds([e["mean"] for e in es], limits(place)))
    return found


def _equal_kl(by_setting: Sequence[Sequence[Ran]], read: Mapping[str, Any]) -> dict[str, Any]:
    """Split -> what PPO has more than best-of-N of the base at the same KL, along straight lines between PPO's points.

    Over seeds, else over prompts. Where PPO's points do not lie on both sides of best-of-N's KL, "outside" says in how
    many runs, and there is no number. Only where one key was swept, and only points that share the base's SFT, from
    which the KL is: at another temperature it is from another policy.
    """
    base, found = by_setting[0], {}
    if len(base[0].setting) != 1 or not {"ppo", "bon"} <= set(read[base[0].name]["policies"]):
        return {}
    curves = {b.name: _curve(b, [r for runs in by_setting for r in runs], read) for b in base}
    if all(len(curve) < 2 for curve in curves.values()):
        return {}
    held = {r.name: _measured(r, read[r.name]) for curve in curves.values() for r in curve}
    for split in read[base[0].name]["policies"]["bon"]:
        differences = [
            at_equal_kl([held[r.name]["ppo"][split] for r in curves[b.name]], held[b.name]["bon"][split]) for b in base
        ]
        inside = [d for d in differences if d is not None]
        if len(inside) < len(base):
            found[split] = {"outside": len(base) - len(inside), "runs": len(base)}
            continue
        found[split] = {}
        for place in inside[0]:
            value_SB = [d[place] for d in inside]
            e = mean_estimate(value_SB[0]) if len(base) == 1 else over_seeds([float(v.mean()) for v in value_SB])
            put(found[split], place, e)
    return found


def _curve(b: Ran, ran: Sequence[Ran], read: Mapping[str, Any]) -> list[Ran]:
    """The points of a base's seed with its SFT and each with a PPO of its own, that base first."""

    def folder(r: Ran, policy: str) -> Path:
        return (r.folder / "samples" / policy).resolve()

    alike = [r for r in ran if _seed(r, read) == _seed(b, read) and folder(r, "sft") == folder(b, "sft")]
    return list({folder(r, "ppo"): r for r in reversed([b, *alike])}.values())[::-1]


def at_equal_kl(curve: Sequence[Measured], other: Measured) -> dict[Place, np.ndarray] | None:
    """Place -> each prompt's value on a curve at the mean KL of `other`, less that of `other`; None if outside it.

    Between the two nearest points of the curve, on either side, values go along a straight line. Its weights are
    estimates as well, for they hang on the three mean KLs; so each prompt's value has what the prompt adds to them, to
    the first order (the infinitesimal jackknife). That has mean 0, and makes an interval over prompts count it.
    """
    if any(KL not in m.means for m in (*curve, other)):
        return None
    at = _mean(other, KL)
    below = [m for m in curve if _mean(m, KL) <= at]
    above = [m for m in curve if _mean(m, KL) >= at]
    if not below or not above:
        return None
    a, b = max(below, key=lambda m: _mean(m, KL)), min(above, key=lambda m: _mean(m, KL))
    width = _mean(b, KL) - _mean(a, KL)
    w = (at - _mean(a, KL)) / width if width else 0.5

    def less(place: Place, prompts: Sequence[Hashable]) -> np.ndarray:
        a_B, b_B, other_B = (np.array([m.means[place][k] for k in prompts]) for m in (a, b, other))
        return (1 - w) * a_B + w * b_B - other_B

    found: dict[Place, np.ndarray] = {}
    for place in (p for p in COMPARED if all(p in m.means for m in (a, b, other))):
        prompts = list(other.means[place])  # a prompt without a reference has no win rate
        kl_B, slope = less(KL, prompts), (_mean(b, place) - _mean(a, place)) / width if width else 0.0
        found[place] = less(place, prompts) - slope * (kl_B - kl_B.mean())
    return found


def _mean(m: Measured, place: Place) -> float:
    return float(np.mean(list(m.means[place].values())))


def _measured(r: Ran, told: Mapping[str, Any]) -> dict[str, dict[str, Measured]]:
    """PPO's and best-of-N's numbers, prompt by prompt."""
    texts, _ = samples.read(r.folder, told)
    found: dict[str, dict[str, Measured]] = {}
    for policy in ("ppo", "bon"):
        for split, held in texts[policy].items():
            records = in_order(held, lambda r: r["id"])
            m, _ = results.numbers(records, told["judge"] if told["judge"] in BY_NUMBERS else "")
            m.add_texts([x["responses"] for x in records], told["config"]["evaluation"]["paper_compat"])
            found.setdefault(policy, {})[split] = m
    return found


def over_kl(
    points: Sequence[Mapping[str, Any]], policy: str, split: str, place: Place
) -> Sequence[tuple[Mapping[str, float], Estimate]]:
    """A policy's (KL to SFT, estimate at `place`) over the settings, by KL; SFT's own KL is 0."""
    held = [dict(walk(p["splits"][split])) for p in points if p["policy"] == policy and split in p["splits"]]
    if policy == "sft":
        held = [h | {KL: {"mean": 0.0, "low": 0.0, "high": 0.0}} for h in held]
    found = [(h[KL], h[place]) for h in held if KL in h and place in h]
    return sorted(found, key=lambda point: point[0]["mean"])


def over_axis(
    points: Sequence[Mapping[str, Any]], policy: str, split: str, place: Place, key: str
) -> list[tuple[float, Estimate]]:
    """A policy's (value of `key`, estimate at `place`) over the settings, by value; empty if values are no numbers."""
    mine = [p for p in points if p["policy"] == policy and split in p["splits"]]
    try:
        held = [(float(p["setting"][key]), dict(walk(p["splits"][split]))) for p in mine]
    except ValueError:
        return []
    return sorted(((x, h[place]) for x, h in held if place in h), key=lambda point: point[0])
