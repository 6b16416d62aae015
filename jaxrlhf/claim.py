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


def claim(workdir: Path, experiment: Experiment) -> None:
    """Writes the resolved config, or makes sure that the workdir belongs to one that differs in nothing that binds."""
    path, resolved = workdir / "config.json", _resolved(experiment)
    if path.exists():
        for change in changes(binding(read_json(path)), binding(resolved)):
            raise UserError(f"{workdir} belongs to another config ({change}); take another --workdir")
    write_json(path, resolved)


def binding(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without what changes no step: the evaluation, the mesh, and which checkpoints are kept."""
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in resolved.items() if k not in ("evaluation", "mesh")}
    for section in kept.values():
        if isinstance(section, dict) and isinstance(section.get("loop"), dict):
            section["loop"] = {k: v for k, v in section["loop"].items() if k not in ("save_every", "keep")}
    return kept


def bound(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What a training stage's checkpoints follow from: the data, the model, and the stages up to this one."""
    found = binding(_resolved(experiment))
    # All climb the reward that config.ppo's penalties shape.
    before = {*names.behind(stage), *(["ppo"] if stage in names.CLIMBERS else [])}
    other = {s for s in names.TRAINED if s not in before} | ({"sampling"} if stage in ("pretrain", "sft") else set())
    return {k: v for k, v in found.items() if k not in ("name", "methods", *other)}


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
