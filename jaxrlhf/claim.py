"""A workdir belongs to one config, and so do its checkpoints: what may change in it, and what may not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrlhf import names
from jaxrlhf.config import Experiment
from jaxrlhf.files import UserError, read_json, write_json


def claim(workdir: Path, experiment: Experiment) -> bool:
    """Writes the resolved config, or makes sure that the workdir belongs to one that differs in nothing that binds.

    Returns whether the workdir was free.
    """
    path, resolved = workdir / "config.json", _resolved(experiment)
    if not (free := not path.exists()):
        for change in changes(binding(read_json(path)), binding(resolved)):
            raise UserError(f"{workdir} belongs to another config ({change}); take another --workdir")
    write_json(path, resolved)
    return free


def binding(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without what changes no step: evaluation, a sweep's axes, the work's layout, what is kept."""
    return _without(resolved, ("evaluation", "sweep", "mesh", "remat", "accumulate", "save_every", "keep"))


def _without(section: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in section.items() if k not in keys}


def bound(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What a training stage's checkpoints follow from: the data, the model, and the stages up to this one."""
    found = binding(_resolved(experiment))
    # All climb the reward that config.ppo's penalties shape.
    before = {*names.behind(stage), *(["ppo"] if stage in names.CLIMBERS else [])}
    other = {s for s in names.TRAINED if s not in before} | ({"sampling"} if stage in ("pretrain", "sft") else set())
    # What is drawn hangs on how many prompts are drawn for at a time; the rest is for measurement.
    found["sampling"] = {"batch_size": found["sampling"]["batch_size"]}
    return {k: v for k, v in found.items() if k not in ("name", "methods", *other)}


def sampled(experiment: Experiment, policy: str) -> dict[str, Any]:
    """What the samples of a policy follow from: how it was trained, and how it is sampled and scored."""
    how = dict(binding(_resolved(experiment))["sampling"])
    if policy != "bon":
        del how["best_of"]
    if policy not in ("sft", "bon"):
        del how["pool"]
    return bound(experiment, "reward" if policy in ("sft", "bon") else policy) | {"sampling": how}


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> Iterator[str]:
    """The keys in which two resolved configs differ, each as `config.a.b: old -> new`."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from changes(a, b, f"{prefix}.{key}")
        elif a != b:
            yield f"{prefix}.{key}: {a!r} -> {b!r}"


def _resolved(experiment: Experiment) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(experiment)))  # tuples as lists, as they are read back
