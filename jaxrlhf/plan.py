"""What a recipe takes on a TPU that is not there: memory a chip, FLOPs, traffic, the least time of each step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh as DeviceMesh

from jaxrlhf import experiment, hub, model, plan_steps, roofline, sharding
from jaxrlhf.config import Experiment
from jaxrlhf.data import tokens, world
from jaxrlhf.files import UserError
from jaxrlhf.logs import progress
from jaxrlhf.names import CLIMBERS
from jaxrlhf.plan_steps import Row
from jaxrlhf.roofline import GIB

STEPS = {stage: tuple(f"{stage} {what}" for what in ("rollout", "score", "update")) for stage in CLIMBERS}
STEPS |= {"sample": ("sample", "sample score")}
SHAPES = {"v4": "2x2x1", "v5e": "8x8", "v5p": "2x2x1", "v6e": "4x4"}
# Keeps libtpu from asking the network which TPU this machine has, and from refusing a second process.
_NOT_THERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# A device is a chip, not one of its two cores.
_MEGACORE = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "wrap": (False,) * 3}


def topology(name: str) -> tuple[roofline.Chip, Sequence[Any]]:
    """The chip and the devices of a topology such as v5e:8x8.

    Raises:
      UserError: there is no such topology, or the compiler for TPUs is not installed.
    """
    known = ", ".join(f"{k}:{v}" for k, v in SHAPES.items())
    chip, _, shape = name.partition(":")
    if chip not in roofline.CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={name!r}: expected CHIP:SHAPE, such as {known}")
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the TPU
    for variable, value in _NOT_THERE.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options: dict[str, Any] = _MEGACORE if chip == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # what libtpu raises has no type of its own
        said = " ".join(str(error).split())
        if "not installed" in said:
            raise UserError("plan takes the compiler for TPUs, an extra: pip install -e '.[plan]'") from None
        raise UserError(f"--topology={name!r}: no such slice ({said[:160]}); there are {known} and others") from None
    return roofline.CHIPS[chip], found.devices


def architecture(config: Experiment) -> model.Architecture:
    """The decoder of a config, of which no more than its config.json is fetched."""
    init = config.model.init
    if init == "base":
        raise UserError("config.model.init='base' is what a workdir holds, and plan has none; name its directory")
    if init:
        directory = hub.directory_of(init, "config.model.init", ("config.json",))
        return experiment.imported_architecture(config, directory, 0)
    sizes = {"files": config.files.vocab_size, "datasets": config.datasets.vocab_size}
    return experiment.architecture(config, sizes.get(config.task) or tokens.word_tokenizer(world.VOCABULARY).size)


def due(config: Experiment) -> tuple[str, ...]:
    """The stages of a config that compute on the mesh."""
    made = not config.model.init and config.pretrain.init == "scratch"
    left = {"evaluate", "report", *([] if made else ["pretrain"]), *(["reward"] if config.reward.init else [])}
    return tuple(s for s in config.stages if s not in left)


def hours(config: Experiment, found: Sequence[Row], chip: roofline.Chip, chips: int) -> dict[str, float]:
    """The least hours of each training stage, from its steps; infinite where a step has no program."""
    total: Counter[str] = Counter()
    for row, seconds in zip(found, plan_steps.times(found, chip, chips), strict=True):
        stage = row.step.split()[0]
        if stage != "sample":
            total[stage] += seconds * getattr(config, stage).loop.steps / 3600
    return dict(total)


def table(config: Experiment, found: Sequence[Row], chip: roofline.Chip, mesh: DeviceMesh) -> str:
    """The rows as lines of text, under what they were compiled for."""
    parts = list(dict.fromkeys(p for r in found for p in r.parts))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"{mesh.size} chips, {axes}; a chip's GiB of {chip.hbm / GIB:.2f}, its GB sent, its seconds",
        f"{'step':<13}{'batch':>6}" + "".join(f"{p:>10}" for p in parts) + f"{'GiB':>8}  fits"
        f"{'PFLOP':>10}{'GB sent':>9}{'compute':>9}{'HBM':>9}{'links':>9}{'at least':>10}",
    ]
    for r in found:
        sizes = "".join(f"{r.parts[p] / GIB:>10.3f}" if p in r.parts else f"{'':>10}" for p in parts)
        start = f"{r.step:<13}{r.batch:>6}{sizes}{r.memory / GIB:>8.2f}  {'yes' if r.fits(chip) else 'no':<4}"
        if r.traffic is None:
            lines.append(f"{start}{r.flops / 1e15:>10.3f}  no program: {r.refused}")
            continue
        seconds = r.seconds(chip, mesh.size)
        sent = sum(r.traffic.sent.values()) / 1e9
        each = "".join(f"{s:>9.4f}" for s in seconds.values())
        lines.append(f"{start}{r.flops / 1e15:>10.3f}{sent:>9.3f}{each}{max(seconds.values()):>9.4f}s")
    lines += [
        f"{stage}: {getattr(config, stage).loop.steps} steps, at least {h:.2f} hours"
        for stage, h in hours(config, found, chip, mesh.size).items()
    ]
    return "\n".join(lines)


def as_json(found: Sequence[Row], chip: roofline.Chip, mesh: DeviceMesh) -> str:
    """The same as one line of JSON, in bytes, FLOPs and seconds."""
    told = [
        dataclasses.asdict(r) | {"memory": r.memory, "fits": r.fits(chip), "seconds": r.seconds(chip, mesh.size)}
        for r in found
    ]
    return json.dumps({"chips": mesh.size, "mesh": dict(mesh.shape), "hbm": chip.hbm, "steps": told})


def told(config: Experiment, name: str, stages: Sequence[str], json_line: bool) -> str:
    """Compiles every step of the stages for the topology `name`, with progress; returns the table, or JSON."""
    chip, devices = topology(name)
    mesh = sharding.make_mesh(config.mesh, devices)
    steps = [step for stage in stages for step in STEPS.get(stage, (stage,))]
    found = []
    with contextlib.closing(progress(f"compiling for {name}", len(steps))) as bar:
        for row in plan_steps.rows(config, architecture(config), chip, mesh, stages):
            found.append(row)
            bar.update()
            bar.set_postfix_str(row.step)
    return as_json(found, chip, mesh) if json_line else table(config, found, chip, mesh)
