"""Every step of a recipe compiled for a TPU that is not there: memory a chip, FLOPs, traffic, the least time.

The steps are those that the stages run, traced on shapes alone, so that a model of any size fits the host. Texts are as
long as the config allows. `report` draws what `rows` finds; `plan_search.py` tries other meshes and batch sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import experiment, hlo, hub, model, optim, policies, ppo, reward, roofline, sampling, sft, sharding
from jaxrlhf import weights as imported
from jaxrlhf.config import Experiment
from jaxrlhf.data import tokens, world
from jaxrlhf.files import UserError
from jaxrlhf.logs import progress
from jaxrlhf.roofline import GIB
from jaxrlhf.split import split
from jaxrlhf.types import ActorCritic, Fixed, PairBatch, PromptBatch, ScalarHead, Scorer, SftBatch

STAGES = ("pretrain", "sft", "reward", "ppo", "sample")
STEPS = {"ppo": ("ppo rollout", "ppo score", "ppo update"), "sample": ("sample", "sample score")}
SHAPES = {"v4": "2x2x1", "v5e": "8x8", "v5p": "2x2x1", "v6e": "4x4"}
# A device is a chip, not one of its two cores.
_MEGACORE = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "wrap": (False,) * 3}


@dataclass(frozen=True)
class Row:
    """One compiled step."""

    step: str
    batch: int  # its rows, as the config counts them
    parts: dict[str, float]  # bytes a chip
    refused: str  # why there is no program; "" = there is one
    flops: float  # of all chips together
    traffic: hlo.Traffic | None

    @property
    def memory(self) -> float:
        """Bytes a chip, of all that lies there while the step runs."""
        return sum(self.parts.values())

    def fits(self, chip: roofline.Chip) -> bool:
        """Whether it does."""
        return not self.refused and self.memory <= chip.hbm

    def seconds(self, chip: roofline.Chip, chips: int) -> dict[str, float]:
        """The least time by compute, HBM and the links between chips; nothing where there is no program."""
        if self.traffic is None:
            return {}
        return roofline.seconds(chip, self.flops / chips, self.traffic.hbm, sum(self.traffic.sent.values()))


def topology(name: str) -> tuple[roofline.Chip, Sequence[jax.Device]]:
    """The chip and the devices of a topology such as v5e:8x8.

    Raises:
      UserError: there is no such topology, or the compiler for TPUs is not installed.
    """
    known = ", ".join(f"{k}:{v}" for k, v in SHAPES.items())
    chip, _, shape = name.partition(":")
    if chip not in roofline.CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={name!r}: expected CHIP:SHAPE, such as {known}")
    jax.config.update("jax_platforms", "cpu")  # else JAX looks for the TPU
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
    trained = STAGES if not config.reward.init else tuple(s for s in STAGES if s != "reward")
    return trained if made else trained[1:]


def rows(config: Experiment, mesh: DeviceMesh, stages: Sequence[str]) -> Iterator[Row]:
    """Compiles each step of the stages in turn; `UserError` for a batch that does not divide over the mesh."""
    arch = architecture(config)
    build = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo, "sample": _sample}
    with jax.set_mesh(mesh):
        for stage in stages:
            yield from build[stage](_Base(config, arch, mesh))


class _Base:
    """Shapes that stages start from, each with its place on the mesh."""

    def __init__(self, config: Experiment, arch: model.Architecture, mesh: DeviceMesh):
        self.config, self.arch, self.mesh = config, arch, mesh
        share = config.model.freeze_layers
        frozen, top = jax.eval_shape(lambda: split(model.init(arch, jax.random.key(0)), share))
        self.frozen = self.lying(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arch.dtype), frozen))
        self.top = self.lying(top)
        head = ScalarHead(
            w_D=jax.ShapeDtypeStruct((arch.width,), jnp.float32), b=jax.ShapeDtypeStruct((), jnp.float32)
        )  # pyright: ignore[reportArgumentType]
        self.scorer, self.actor = Scorer(top=self.top, head=head), ActorCritic(top=self.top, value=head)
        self.scorer, self.actor = self.lying(self.scorer), self.lying(self.actor)
        c = config.model
        self.length = c.prompt_length + c.response_length

    def lying(self, tree: Any) -> Any:
        """A tree of shapes with the places that parameters have."""
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        return jax.tree.map(put, tree, sharding.layout(tree, self.mesh))

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of a batch, divided by rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh))

    def state(self, tx: Any, params: Any, kl_coef: bool = False) -> Any:
        """What a stage starts from that trains `params`."""
        start = lambda p: optim.fresh(tx, p, jnp.float32(0) if kl_coef else None)  # noqa: E731
        return self.lying(jax.eval_shape(start, params))

    @property
    def key(self) -> Any:
        """A random key, on every chip."""
        shape = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(self.mesh, P()))

    def generation(self, temperature: float) -> sampling.Generation:
        """Sampling up to the longest response."""
        return sampling.Generation(max_tokens=self.config.model.response_length, temperature=temperature)

    def check(self, stage: str, parts: int = 1, size: int = 0) -> None:
        """`UserError` for a batch that the stage itself would refuse."""
        name = "sampling" if stage == "sample" else stage
        size = size or getattr(self.config, name).batch_size
        sharding.check_divides(f"config.{name}.batch_size", size, self.mesh, parts)


def _measure(step: str, batch: int, jitted: Any, arguments: tuple, parts: dict[str, Any]) -> tuple[Row, Any]:
    """A step's row, and the shapes of what it returns. `parts` are all trees that lie on the chips meanwhile."""
    traced = jitted.trace(*arguments)
    sizes = {name: roofline.held(tree) for name, tree in parts.items()}
    work = roofline.flops(traced.jaxpr)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Row(step, batch, sizes, _refusal(str(error)), work, None), None
    m = compiled.memory_analysis()
    given = sum(roofline.held(x) for x in jax.tree.leaves(arguments) if hasattr(x, "sharding") and not _is_key(x))
    padding = max(m.argument_size_in_bytes - given, 0)
    made = m.output_size_in_bytes - m.alias_size_in_bytes
    sizes["working"] = m.temp_size_in_bytes + m.generated_code_size_in_bytes + made + padding
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    results = jax.tree.map(put, traced.out_info, compiled.output_shardings)
    return Row(step, batch, sizes, "", work, hlo.traffic(compiled.as_text())), results


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _refusal(said: str) -> str:
    """How much a refused program would take, in the compiler's words."""
    found = re.search(r"\(?([\d.]+[KMGT])\)? exceeds|Used ([\d.]+[KMGT]) of", said)
    return f"takes {found[1] or found[2]}iB" if found else " ".join(said.split())[:80]


def _pretrain(base: _Base) -> Iterator[Row]:
    everything = replace(base.config, model=replace(base.config.model, freeze_layers=0.0))
    yield _next_token(_Base(everything, base.arch, base.mesh), "pretrain")


def _sft(base: _Base) -> Iterator[Row]:
    yield _next_token(base, "sft")


def _next_token(base: _Base, stage: str) -> Row:
    c = base.config.sft if stage == "sft" else base.config.pretrain
    base.check(stage, c.optim.accumulate)
    tx = optim.optimizer(c.optim, c.loop.steps)
    state = base.state(tx, base.top)
    shape = (c.batch_size, base.length)
    batch = SftBatch(*(base.array(shape, d) for d in (jnp.int32, jnp.float32, jnp.float32)))
    parts = _parts(base, state) | {"batch": batch} | ({} if stage == "pretrain" else {"held": base.top})
    arguments = (base.arch, tx, state, base.frozen, batch, c.optim.accumulate)
    return _measure(stage, c.batch_size, sft.step, arguments, parts)[0]


def _parts(base: _Base, state: Any) -> dict[str, Any]:
    return {"frozen": base.frozen, "trained": state.params, "optimizer": state.opt_state}


def _reward(base: _Base) -> Iterator[Row]:
    c = base.config.reward
    base.check("reward", c.optim.accumulate)
    tx = optim.optimizer(c.optim, c.loop.steps)
    state = base.state(tx, base.scorer)
    shape = (2 * c.batch_size, base.length)
    batch = PairBatch(*(base.array(shape, d) for d in (jnp.int32, jnp.float32)))
    parts = _parts(base, state) | {"batch": batch, "held": base.top}
    arguments = (base.arch, tx, state, base.frozen, batch, c.optim.accumulate)
    yield _measure("reward", c.batch_size, reward.step, arguments, parts)[0]


def _ppo(base: _Base) -> Iterator[Row]:
    """Rollout, score and update: what one of them holds, the others hold too."""
    c, arch = base.config.ppo, base.arch
    base.check("ppo")
    tx = optim.optimizer(c.optim, c.loop.steps * c.epochs * c.minibatches)
    state = base.state(tx, base.actor, kl_coef=True)
    scorer = None if base.config.reward.init else base.scorer
    fixed = Fixed(frozen=base.frozen, ref=base.top, scorer=scorer)
    prompts = _prompts(base, c.batch_size)
    parts = _parts(base, state) | {"held": (base.top, fixed.ref, fixed.scorer)}

    arguments = (arch, base.generation(c.temperature), base.frozen, state.params.top)
    arguments = (*arguments, prompts.tokens_BP, prompts.mask_BP, base.key)
    row, drawn = _measure("ppo rollout", c.batch_size, sampling.sample, arguments, parts | {"batch": prompts})
    yield row
    if drawn is None:
        return
    given_B = base.array((c.batch_size,), jnp.float32) if scorer is None else None
    arguments = (arch, c, fixed, state.params, state.kl_coef, prompts, drawn, given_B)
    row, found = _measure("ppo score", c.batch_size, ppo.score, arguments, parts | {"batch": (prompts, drawn)})
    yield row
    if found is None:
        return
    arguments = (arch, tx, c, state, base.frozen, found[0], base.key)
    batch = (prompts, drawn, found[0])
    yield _measure("ppo update", c.batch_size, ppo.update, arguments, parts | {"batch": batch})[0]


def _prompts(base: _Base, size: int) -> PromptBatch:
    shape = (size, base.config.model.prompt_length)
    return PromptBatch(
        tokens_BP=base.array(shape, jnp.int32),
        mask_BP=base.array(shape, jnp.float32),
        index_B=base.array((size,), jnp.int32),
    )


def _sample(base: _Base) -> Iterator[Row]:
    """The pool of SFT samples of a batch of prompts, and their scores."""
    c, arch = base.config.sampling, base.arch
    base.check("sample")
    prompts = _prompts(base, c.batch_size)
    gen = replace(base.generation(c.temperature), top_k=c.top_k, top_p=c.top_p)
    arguments = (arch, gen, base.frozen, base.top, prompts.tokens_BP, prompts.mask_BP, base.key, c.pool)
    scorer = () if base.config.reward.init else base.scorer
    parts = {"frozen": base.frozen, "trained": base.top, "held": (base.top, scorer)}
    row, drawn = _measure("sample", c.batch_size, sampling.sample, arguments, parts | {"batch": prompts})
    yield row
    if drawn is None or not scorer:
        return
    shape = (c.batch_size * c.pool, base.length)
    batch = (base.array(shape, jnp.int32), base.array(shape, jnp.float32))
    arguments = (arch, base.frozen, base.scorer, *batch)
    yield _measure("sample score", c.batch_size, policies.score, arguments, parts | {"batch": (drawn, batch)})[0]


def times(found: Sequence[Row], chip: roofline.Chip, chips: int) -> list[float]:
    """The least seconds of each step; infinite where there is no program."""
    return [max(r.seconds(chip, chips).values(), default=math.inf) for r in found]


def hours(config: Experiment, found: Sequence[Row], chip: roofline.Chip, chips: int) -> dict[str, float]:
    """The least hours of each training stage, from its steps; infinite where a step has no program."""
    total: Counter[str] = Counter()
    for row, seconds in zip(found, times(found, chip, chips), strict=True):
        stage = row.step.split()[0]
        if stage != "sample":
            total[stage] += seconds * getattr(config, stage).loop.steps / 3600
    return dict(total)


def table(config: Experiment, found: Sequence[Row], chip: roofline.Chip, mesh: DeviceMesh) -> str:
    """The rows as lines of text, under what they were compiled for."""
    parts = list(dict.fromkeys(p for r in found for p in r.parts))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"{mesh.size} chips, {axes}; {chip.hbm / GIB:.2f} GiB can be used of each; GiB, GB sent and seconds are a chip's",
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
        dataclasses.asdict(r)
        | {"memory": r.memory, "fits": r.fits(chip), "seconds": r.seconds(chip, mesh.size)}
        for r in found
    ]
    return json.dumps({"chips": mesh.size, "mesh": dict(mesh.shape), "hbm": chip.hbm, "steps": told})


def plan(config: Experiment, name: str, stages: Sequence[str], json_line: bool) -> str:
    """Compiles every step of the stages for the topology `name`, with progress; returns the table, or JSON."""
    chip, devices = topology(name)
    mesh = sharding.make_mesh(config.mesh, devices)
    steps = [step for stage in stages for step in STEPS.get(stage, (stage,))]
    found = []
    with contextlib.closing(progress(f"compiling for {name}", len(steps))) as bar:
        for row in rows(config, mesh, stages):
            found.append(row)
            bar.update()
            bar.set_postfix_str(row.step)
    return as_json(found, chip, mesh) if json_line else table(config, found, chip, mesh)
