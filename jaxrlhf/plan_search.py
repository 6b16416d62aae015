"""Which mesh and batch sizes a TPU slice runs a recipe fastest with, by the compiler's memory and the roofline."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxrlhf import plan, plan_steps, sharding
from jaxrlhf.config import Experiment, Mesh
from jaxrlhf.logs import progress
from jaxrlhf.model import Architecture
from jaxrlhf.names import CLIMBERS
from jaxrlhf.roofline import GIB, Chip

WORTH_IT = 1.05  # a doubled batch that is less faster than this is where doubling ends
SHOWN = 8


@dataclass(frozen=True)
class Trial:
    """A stage on a mesh, with a batch size."""

    stage: str
    mesh: Mesh
    batch: int
    memory: float  # bytes a chip, of the stage's fullest step
    seconds: float  # least, of all its steps; infinite where one has no program
    fits: bool

    @property
    def rate(self) -> float:
        """Rows a second, at most."""
        return self.batch / self.seconds


def meshes(chips: int, arch: Architecture) -> list[Mesh]:
    """All ways to lay out the chips; `tensor` divides the key/value heads, else they would lie there whole."""
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    return [
        Mesh(data=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor)
        for tensor in sizes
        for fsdp in sizes
        if arch.kv_heads % tensor == 0 and chips // tensor % fsdp == 0
    ]


def with_batch(config: Experiment, stage: str, batch: int) -> Experiment:
    """The config with another batch size in a stage's section."""
    name = section(stage)
    changed: Any = {name: replace(getattr(config, name), batch_size=batch)}
    return replace(config, **changed)


def section(stage: str) -> str:
    """The config's section that holds a stage's batch size."""
    return "sampling" if stage == "sample" else stage


def trials(config: Experiment, arch: Architecture, chip: Chip, devices: Sequence, stage: str, mesh: Mesh) -> Iterator:
    """The config's batch size, or the next that divides: doubled while it fits and pays, or halved until it fits."""
    laid, before = sharding.make_mesh(mesh, devices), 0.0
    least = mesh.data * mesh.fsdp * _parts(config, stage)
    batch = -(-getattr(config, section(stage)).batch_size // least) * least
    shrinking = False
    while True:
        found = list(plan_steps.rows(with_batch(config, stage, batch), arch, chip, laid, (stage,)))
        seconds, fits = sum(plan_steps.times(found, chip, laid.size)), all(r.fits(chip) for r in found)
        trial = Trial(stage, mesh, batch, max(r.memory for r in found), seconds, fits)
        yield trial
        shrinking |= not fits and not before
        if shrinking and (fits or batch // 2 % least):
            return
        if not shrinking and (not fits or trial.rate < WORTH_IT * before):
            return
        before, batch = trial.rate, batch // 2 if shrinking else 2 * batch


def _parts(config: Experiment, stage: str) -> int:
    """What a stage divides its batch into, one after the other."""
    if stage == "sample":
        return 1
    c = getattr(config, stage)
    return c.optim.accumulate * (c.minibatches if stage in CLIMBERS else 1)


def told(config: Experiment, name: str, stages: Sequence[str], json_line: bool) -> str:
    """Tries every mesh of the topology `name` for every stage, with progress; returns the ranking, or JSON."""
    chip, devices = plan.topology(name)
    arch = plan.architecture(config)
    options = meshes(len(devices), arch)
    found: list[Trial] = []
    with contextlib.closing(progress(f"searching {name}", len(options) * len(stages))) as bar:
        for stage in stages:
            for mesh in options:
                found += trials(config, arch, chip, devices, stage, mesh)
                bar.set_postfix_str(f"{stage}, {_axes(mesh)}", refresh=False)
                bar.update()
    if not json_line:
        return table(config, found)
    return json.dumps([dataclasses.asdict(t) | {"rate": t.rate} for t in found if t.fits])


def _axes(mesh: Mesh) -> str:
    return " x ".join(f"{k} {v}" for k, v in dataclasses.asdict(mesh).items())


def best(found: Sequence[Trial]) -> list[Trial]:
    """Those that fit, the fastest first; of like speed, the one that takes less memory."""
    return sorted((t for t in found if t.fits), key=lambda t: (-t.rate, t.memory))


def hours(config: Experiment, found: Sequence[Trial]) -> list[tuple[float, Mesh, dict[str, int]]]:
    """Meshes that all training stages fit, by the least hours for the examples that the config asks for."""
    stages = dict.fromkeys(t.stage for t in found if t.stage != "sample")
    ranked = []
    for mesh in dict.fromkeys(t.mesh for t in found):
        fastest = {s: best([t for t in found if t.mesh == mesh and t.stage == s])[:1] for s in stages}
        if all(fastest.values()):
            total = sum(
                getattr(config, s).loop.steps * getattr(config, s).batch_size / t.rate for s, (t,) in fastest.items()
            )
            ranked.append((total / 3600, mesh, {s: t.batch for s, (t,) in fastest.items()}))
    return sorted(ranked, key=lambda r: r[0])


def table(config: Experiment, found: Sequence[Trial]) -> str:
    """The ranking of each stage, and of meshes for all stages that were tried."""
    lines = []
    for stage in dict.fromkeys(t.stage for t in found):
        ranked = best([t for t in found if t.stage == stage])
        tried = sum(t.stage == stage for t in found)
        lines.append(f"{stage}: {len(ranked)} of {tried} fit; {section(stage)}.batch_size, GiB a chip, rows a second")
        lines += [f"  {_axes(t.mesh):<30}{t.batch:>6}{t.memory / GIB:>8.2f}{t.rate:>10.2f}" for t in ranked[:SHOWN]]
    lines.append("all training stages tried: least hours for as many examples as the config asks for")
    for h, mesh, batches in hours(config, found)[:SHOWN]:
        sizes = ", ".join(f"{s} {b}" for s, b in batches.items())
        lines.append(f"  {_axes(mesh):<30}{h:>8.2f}  batches: {sizes}")
    return "\n".join(lines)
