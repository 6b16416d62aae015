"""The steps that stages run, compiled from shapes alone for a mesh that is not there, and what each takes.

Nothing of a model is ever made, so that one of any size fits the host. Texts are as long as the config allows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import dpo, groups, hlo, model, optim, policies, ppo, reward, roofline, sampling, sft, sharding
from jaxrlhf.config import Experiment, Grpo, Ppo, Rloo
from jaxrlhf.data import packing
from jaxrlhf.split import split
from jaxrlhf.types import ActorCritic, Ensemble, Fixed, PairBatch, PromptBatch, Sample, ScalarHead, Scorer, SftBatch


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


def rows(
    config: Experiment, arch: model.Architecture, chip: roofline.Chip, mesh: DeviceMesh, stages: Sequence[str]
) -> Iterator[Row]:
    """Compiles each step of the stages in turn; `UserError` for a batch that does not divide over the mesh."""
    build: dict[str, Any] = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo, "sample": _sample}
    build |= {"dpo": _dpo, "rloo": partial(_group, "rloo"), "grpo": partial(_group, "grpo")}
    with jax.set_mesh(mesh):
        for stage in stages:
            yield from build[stage](_base(config, arch, chip, mesh))


@dataclass(frozen=True)
class _Base:
    """Shapes that stages start from, each with its place on the mesh."""

    config: Experiment
    arch: model.Architecture
    chip: roofline.Chip
    mesh: DeviceMesh
    frozen: Any
    top: Any
    scorer: Any
    actor: Any


def _base(config: Experiment, arch: model.Architecture, chip: roofline.Chip, mesh: DeviceMesh) -> _Base:
    share = config.model.freeze_layers
    frozen, top = jax.eval_shape(lambda: split(model.init(arch, jax.random.key(0)), share))
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, arch.dtype), frozen)
    head = ScalarHead(w_D=jax.ShapeDtypeStruct((arch.width,), jnp.float32), b=jax.ShapeDtypeStruct((), jnp.float32))  # pyright: ignore[reportArgumentType]
    trees = frozen, top, _members(Scorer(top=top, head=head), config), ActorCritic(top=top, value=head)
    return _Base(config, arch, chip, mesh, *(_lying(tree, mesh) for tree in trees))


def _lying(tree: Any, mesh: DeviceMesh) -> Any:
    """A tree of shapes with the places that parameters have."""
    return jax.tree.map(_at, tree, sharding.layout(tree, mesh))


def _array(base: _Base, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of a batch, divided by rows."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(base.mesh))


def _state(base: _Base, tx: Any, params: Any, kl_coef: bool = False) -> Any:
    """What a stage starts from that trains `params`."""
    start = lambda p: optim.fresh(tx, p, jnp.float32(0) if kl_coef else None)  # noqa: E731
    return _lying(jax.eval_shape(start, params), base.mesh)


def _key(base: _Base) -> Any:
    """A random key, on every chip."""
    shape = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(base.mesh, P()))


def _generation(base: _Base, temperature: float) -> sampling.Generation:
    return sampling.Generation(max_tokens=base.config.model.response_length, temperature=temperature)


def _length(base: _Base) -> int:
    return base.config.model.prompt_length + base.config.model.response_length


def _check(base: _Base, section: str, size: int, parts: int = 1) -> None:
    """`UserError` for a batch that the stage itself would refuse."""
    sharding.check_divides(f"config.{section}.batch_size", size, base.mesh, parts)


def _measure(base: _Base, step: str, batch: int, jitted: Any, arguments: tuple, parts: Any) -> tuple[Row, Any]:
    """A step's row, and the shapes of what it returns. `parts` are all trees that lie on the chips meanwhile."""
    traced = jitted.trace(*arguments)
    sizes = {name: roofline.held(tree) for name, tree in parts.items()}
    work = roofline.flops(traced.jaxpr)
    if sum(sizes.values()) > base.chip.hbm:  # seen without minutes of compilation
        return Row(step, batch, sizes, "what lies there before the step is too much", work, None), None
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
    results = jax.tree.map(_at, traced.out_info, compiled.output_shardings)
    return Row(step, batch, sizes, "", work, hlo.traffic(compiled.as_text())), results


def _at(x: Any, place: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _refusal(said: str) -> str:
    """How much a refused program would take, in the compiler's words."""
    found = re.search(r"\(?([\d.]+[KMGT])\)? exceeds|Used ([\d.]+[KMGT]) of", said)
    return f"takes {found[1] or found[2]}iB" if found else " ".join(said.split())[:80]


def _pretrain(base: _Base) -> Iterator[Row]:
    everything = replace(base.config, model=replace(base.config.model, freeze_layers=0.0))
    yield _next_token(_base(everything, base.arch, base.chip, base.mesh), "pretrain")


def _sft(base: _Base) -> Iterator[Row]:
    yield _next_token(base, "sft")


def _next_token(base: _Base, stage: str) -> Row:
    c = base.config.sft if stage == "sft" else base.config.pretrain
    _check(base, stage, c.batch_size, c.optim.accumulate)
    tx = optim.optimizer(c.optim, c.loop.steps)
    state = _state(base, tx, base.top)
    shape = (c.batch_size, _length(base))
    batch = SftBatch(*(_array(base, shape, d) for d in (jnp.int32, jnp.float32, jnp.float32)))
    answers = 0 if c.prompt_weight else base.config.model.response_length
    if packing.picks(answers, shape[1]):
        before_BQ = _array(base, (c.batch_size, answers), jnp.int32)
        batch = batch.replace(before_BQ=before_BQ)  # pyright: ignore[reportAttributeAccessIssue]
    parts = _parts(base, state) | {"batch": batch} | ({} if stage == "pretrain" else {"held": base.top})
    arguments = (base.arch, tx, state, base.frozen, batch, c.optim.accumulate)
    return _measure(base, stage, c.batch_size, sft.step, arguments, parts)[0]


def _parts(base: _Base, state: Any) -> dict[str, Any]:
    return {"frozen": base.frozen, "trained": state.params, "optimizer": state.opt_state}


def _reward(base: _Base) -> Iterator[Row]:
    c = base.config.reward
    _check(base, "reward", c.batch_size, c.optim.accumulate)
    tx = optim.optimizer(c.optim, c.loop.steps)
    tx = tx if c.ensemble == 1 else optim.of_each(tx)
    state = _state(base, tx, base.scorer)
    batch = _pairs(base, c.batch_size * c.ensemble)
    parts = _parts(base, state) | {"batch": batch, "held": base.top}
    arguments = (base.arch, tx, state, base.frozen, batch, c.optim.accumulate)
    yield _measure(base, "reward", c.batch_size, reward.step, arguments, parts)[0]


def _dpo(base: _Base) -> Iterator[Row]:
    c = base.config.dpo
    _check(base, "dpo", c.batch_size, c.optim.accumulate)
    tx = optim.optimizer(c.optim, c.loop.steps)
    state = _state(base, tx, base.top)
    batch = _pairs(base, c.batch_size)
    parts = _parts(base, state) | {"batch": batch, "held": (base.top, base.top)}
    arguments = (base.arch, tx, c, state, base.frozen, base.top, batch)
    yield _measure(base, "dpo", c.batch_size, dpo.step, arguments, parts)[0]


def _pairs(base: _Base, pairs: int) -> PairBatch:
    shape = (pairs, _length(base) + base.config.model.response_length)
    return PairBatch(
        tokens_BT=_array(base, shape, jnp.int32),
        mask_BT=_array(base, shape, jnp.float32),
        ends_BN2=_array(base, (pairs, 1, 2), jnp.int32),
        pair_BN=_array(base, (pairs, 1), jnp.float32),
    )


def _ppo(base: _Base) -> Iterator[Row]:
    c = base.config.ppo
    tx = optim.optimizer(c.optim, c.loop.steps * c.epochs * c.minibatches)
    state, fixed = _state(base, tx, base.actor, kl_coef=True), _fixed(base)

    def score(prompts: PromptBatch, drawn: Sample, given_B: Any) -> tuple[Any, tuple]:
        return ppo.score, (base.arch, c, fixed, state.params, state.kl_coef, prompts, drawn, given_B)

    def update(rollout: Any) -> tuple[Any, tuple]:
        return ppo.update, (base.arch, tx, c, state, fixed, rollout, _key(base))

    yield from _climb(base, "ppo", c, 1, state, score, update)


def _group(stage: str, base: _Base) -> Iterator[Row]:
    c = getattr(base.config, stage)
    epochs = c.epochs if isinstance(c, Grpo) else 1
    tx = optim.optimizer(c.optim, c.loop.steps * epochs * c.minibatches)
    state, fixed = _state(base, tx, base.top), _fixed(base)

    def score(prompts: PromptBatch, drawn: Sample, given_B: Any) -> tuple[Any, tuple]:
        return groups.score, (base.arch, base.config.ppo, c, fixed, state.params, prompts, drawn, given_B)

    def update(rollout: Any) -> tuple[Any, tuple]:
        return groups.update, (base.arch, tx, c, state, base.frozen, rollout, _key(base))

    yield from _climb(base, stage, c, c.samples, state, score, update)


def _fixed(base: _Base) -> Fixed:
    return Fixed(frozen=base.frozen, ref=base.top, scorer=None if base.config.reward.init else base.scorer)


def _climb(
    base: _Base, stage: str, c: Ppo | Rloo | Grpo, samples: int, state: Any, score: Any, update: Any
) -> Iterator[Row]:
    """Rollout, score and update: what one of them holds, the others hold too."""
    _check(base, stage, c.batch_size)
    policy = state.params.top if stage == "ppo" else state.params
    parts = _parts(base, state) | {"held": (base.top, _fixed(base).ref, _fixed(base).scorer)}
    prompts, repeated = _prompts(base, c.batch_size), _prompts(base, c.batch_size * samples)
    given_B = _array(base, (c.batch_size * samples,), jnp.float32) if base.config.reward.init else None

    def measured(what: str, called: tuple[Any, tuple], batch: Any) -> tuple[Row, Any]:
        return _measure(base, f"{stage} {what}", c.batch_size, *called, parts | {"batch": batch})

    arguments = (base.arch, _generation(base, c.temperature), base.frozen, policy)
    arguments = (*arguments, prompts.tokens_BP, prompts.mask_BP, _key(base), samples, True)
    row, drawn = measured("rollout", (sampling.sample, arguments), prompts)
    yield row
    if drawn is None:
        return
    row, found = measured("score", score(repeated, drawn, given_B), (repeated, drawn))
    yield row
    if found is not None:
        yield measured("update", update(found[0]), (repeated, drawn, found[0]))[0]


def _members(scorer: Scorer, config: Experiment) -> Scorer | Ensemble:
    """The reward model, or as many as an ensemble has, stacked."""
    c = config.reward
    if c.ensemble == 1:
        return scorer
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((c.ensemble, *x.shape), x.dtype), scorer)
    return Ensemble(members=stacked, combine=c.combine, uncertainty_coef=c.uncertainty_coef)


def _prompts(base: _Base, size: int) -> PromptBatch:
    shape = (size, base.config.model.prompt_length)
    return PromptBatch(
        tokens_BP=_array(base, shape, jnp.int32),
        mask_BP=_array(base, shape, jnp.float32),
        index_B=_array(base, (size,), jnp.int32),
    )


def _sample(base: _Base) -> Iterator[Row]:
    """The pool of SFT samples of a batch of prompts, and their scores."""
    c, arch = base.config.sampling, base.arch
    _check(base, "sampling", c.batch_size)
    prompts = _prompts(base, c.batch_size)
    gen = replace(_generation(base, c.temperature), top_k=c.top_k, top_p=c.top_p)
    arguments = (arch, gen, base.frozen, base.top, prompts.tokens_BP, prompts.mask_BP, _key(base), c.pool)
    scorer = () if base.config.reward.init else base.scorer
    parts = {"frozen": base.frozen, "trained": base.top, "held": (base.top, scorer)}
    row, drawn = _measure(base, "sample", c.batch_size, sampling.sample, arguments, parts | {"batch": prompts})
    yield row
    if drawn is None or not scorer:
        return
    shape = (c.batch_size * c.pool, _length(base))
    batch = (_array(base, shape, jnp.int32), _array(base, shape, jnp.float32))
    arguments = (arch, base.frozen, base.scorer, *batch)
    yield _measure(base, "sample score", c.batch_size, policies.score, arguments, parts | {"batch": (drawn, batch)})[0]


def times(found: Sequence[Row], chip: roofline.Chip, chips: int) -> list[float]:
    """The least seconds of each step; infinite where there is no program."""
    return [max(r.seconds(chip, chips).values(), default=math.inf) for r in found]
