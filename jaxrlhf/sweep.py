"""A sweep: one recipe, several points, each of them a run, and what points share trained once.

`config.sweep` holds axes; a point is one value of each. A point's workdir is `points/<name>`, where what it trains,
samples and prepares are links to `shared/<what>-<hash>`. The hash is that of all keys it follows from, so points that
agree on these find one folder: whichever comes first fills it, also half-way, and the others go on from there.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jaxrlhf import names, recipes, stages
from jaxrlhf.claim import bound, claim, sampled
from jaxrlhf.config import Experiment
from jaxrlhf.evaluation import report, tradeoff
from jaxrlhf.files import Failure, Stopped, UserError
from jaxrlhf.logs import say
from jaxrlhf.store import Workdir

SEEDS = ("seed", "ppo.seed")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # of its folder
    setting: Mapping[str, str]  # the first key of each axis, but for seeds -> its value
    seed_key: str  # "" where no seed is swept
    experiment: Experiment


def points(e: Experiment) -> list[Point]:
    """Every combination of the axes' values, the first axis slowest, checked.

    Raises:
      UserError: an axis that does not parse, a key that does not exist, a value that no run could have, two points of
        one name, or two axes of seeds.
    """
    axes = [_axis(text) for text in e.sweep]
    seeds = [next(iter(axis[0])) for axis in axes if next(iter(axis[0])) in SEEDS]
    if len(seeds) > 1:
        raise UserError(f"config.sweep: {' and '.join(seeds)}; one axis of seeds can be swept")
    found: list[Point] = []
    for chosen in itertools.product(*axes):
        firsts = dict(next(iter(values.items())) for values in chosen)
        name = ",".join(f"{_short(key, firsts)}={value.replace('/', '_')}" for key, value in firsts.items())
        setting = {key: value for key, value in firsts.items() if key not in SEEDS}
        experiment = _changed(e, {k: v for values in chosen for k, v in values.items()})
        if name in [p.name for p in found] or experiment in [p.experiment for p in found]:
            raise UserError(f"config.sweep: {name} twice; a value stands once on its axis")
        found.append(Point(name, setting, seeds[0] if seeds else "", experiment))
    return found


def run(e: Experiment, workdir: Path) -> None:
    """Runs every point that is not complete, and draws one report of all.

    A point that fails is named in results.json and in the report, and the others go on.

    Raises:
      Failure: at the end, where a point failed.
      UserError: no point could run, for the first one's reason; or the workdir holds a run.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds a run of its own; name another folder for a sweep")
    ran: list[tradeoff.Ran] = []
    failed: dict[str, Exception] = {}
    swept = points(e)
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").resolve()))
    for i, point in enumerate(swept, 1):
        folder = workdir / "points" / point.name
        unclaimed = not (folder / "config.json").exists()
        say(f"[point {i}/{len(swept)}] {point.name}")
        try:
            claim(folder, point.experiment)
            _share(point.experiment, folder, workdir)
            due = [s for s in point.experiment.stages if s != "report"]
            stages.run_stages(point.experiment, Workdir(folder), due, skip_finished=True)
            ran.append(tradeoff.Ran(point.name, point.setting, point.seed_key, folder))
        except Stopped:
            raise
        except Exception as error:  # whatever a point dies of, the others may live
            failed[point.name] = error
            if isinstance(error, UserError) and unclaimed:
                (folder / "config.json").unlink(missing_ok=True)  # the corrected config may have the folder
            if not isinstance(error, UserError | Failure):
                traceback.print_exc()
            say(f"[point {i}/{len(swept)}] {point.name} failed: {_line(error)}")
        jax.clear_caches()
    if not ran:
        raise next(iter(failed.values()))
    told = {name: _line(error) for name, error in failed.items()}
    tradeoff.write(ran, [p.setting for p in swept], told, workdir)
    print(report.write_report(workdir))
    if failed:
        raise Failure(
            f"{len(failed)} of {len(swept)} points failed: {', '.join(failed)}; the same command tries them again"
        )


def _line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError | Failure) else f"{type(error).__name__}: {said[:500]}"


def _axis(text: str) -> list[dict[str, str]]:
    """An axis' values, each as key -> value; a value without a key is the first key's."""
    found: list[dict[str, str]] = []
    for value in (part.strip() for part in text.split(";")):
        if value and "=" not in value and found:
            value = f"{next(iter(found[0]))}={value}"
        pairs = [word.partition("=") for word in value.split()]
        if not pairs or not all(key and sign for key, sign, _ in pairs) or (found and pairs[0][0] not in found[0]):
            raise UserError(f"config.sweep: {text!r} is no axis; write one as 'ppo.kl_coef=0.05; 0.2; 0.8'")
        found.append({key: word for key, _, word in pairs})
    return found


def _short(key: str, keys: Sequence[str] | Mapping[str, str]) -> str:
    last = key.rpartition(".")[2]
    return last if [k.rpartition(".")[2] for k in keys].count(last) == 1 else key


def _changed(e: Experiment, changes: Mapping[str, str]) -> Experiment:
    tree = dataclasses.asdict(e) | {"sweep": ()}
    known = {key: value for key, value in _leaves(tree) if key != "sweep"}
    for key, text in changes.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            raise UserError(f"config.sweep: {key}: no such key; the nearest is {near}")
        *sections, last = key.split(".")
        holder: Any = tree
        for section in sections:
            holder = holder[section]
        holder[last] = _value(key, text, known[key])
    return recipes.resolve(ml_collections.ConfigDict(tree))


def _value(key: str, text: str, old: Any) -> Any:
    kind = type(old)
    if kind not in (int, float, str):
        raise UserError(f"config.sweep: {key} is no number and no text, and cannot be swept")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"config.sweep: {key}={text}: must be as {old!r} is, of type {kind.__name__}") from None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _share(e: Experiment, folder: Path, workdir: Path) -> None:
    """Links what a point shares with others from its workdir."""
    parts = {"data": bound(e, "pretrain")} | {s: bound(e, s) for s in e.stages if s in names.TRAINED}
    trained = [p for p in names.POLICIES if p in ("sft", "bon", *e.stages)]
    parts |= {f"samples/{p}": sampled(e, p) for p in trained}
    for what, follows_from in parts.items():
        digest = hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()[:12]
        _link(folder / what, workdir / "shared" / f"{what.replace('/', '-')}-{digest}")
    if (workdir / "base").exists():
        _link(folder / "base", workdir / "base")


def _link(link: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
