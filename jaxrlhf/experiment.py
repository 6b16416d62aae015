"""One experiment in its workdir: what every stage starts from, and how a stage finds what an earlier one left."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import checkpoint, hosts, model, sharding, weights
from jaxrlhf.claim import bound
from jaxrlhf.config import Experiment
from jaxrlhf.data.task import Task, base_directory
from jaxrlhf.files import UserError, read_json, write_json
from jaxrlhf.split import take_apart, tree_hash
from jaxrlhf.store import Workdir
from jaxrlhf.types import ActorCritic, Ensemble, Frozen, Params, ScalarHead, Scorer, Top

ASSETS = Path(__file__).parent / "assets"


class Lengths(TypedDict):
    """What batches cut texts to, in tokens."""

    prompt_length: int
    response_length: int


@dataclass(frozen=True)
class Run:
    """An experiment, its workdir and its data: what each stage is handed."""

    config: Experiment
    workdir: Path
    task: Task
    title: str  # of the stage under way, as progress shows it
    remote: Workdir | None = None  # where the workdir stands for a place in an object store

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices, laid out as `config.mesh` says."""
        return sharding.make_mesh(self.config.mesh)

    @cached_property
    def arch(self) -> model.Architecture:
        """The decoder that `config.model` and the tokenizer describe, or the one that is imported."""
        if self.config.model.init:
            return imported_architecture(self.config, self.imported, self.task.tokenizer.size)
        return architecture(self.config, self.task.tokenizer.size)

    @cached_property
    def imported(self) -> Path:
        """The Hugging Face directory that `config.model.init` names."""
        return base_directory(self.config, self.workdir)

    @cached_property
    def base(self) -> tuple[Frozen, Top]:
        """FROZEN, in `config.model.dtype`, and TOP, in f32, of the base model, on the mesh."""
        frozen, top = take_apart(base_params(self), self.config.model.freeze_layers)
        frozen = jax.tree.map(lambda x: x.astype(self.config.model.dtype), frozen)
        top = jax.tree.map(lambda x: x.astype(jnp.float32), top)
        return sharding.place(frozen, self.mesh), sharding.place(top, self.mesh)

    @cached_property
    def trunk(self) -> str:
        """The hash of FROZEN."""
        return tree_hash(self.base[0])[:16]

    def meta(self, stage: str) -> dict[str, Any]:
        """What a stage's checkpoints must share with this experiment; a base that `pretrain` makes has no trunk yet."""
        found = {"config": bound(self.config, stage), "tokenizer": self.task.tokenizer.hash}
        return found if stage == "pretrain" else found | {"frozen": self.trunk}

    @property
    def lengths(self) -> Lengths:
        """Tokens that a prompt and a response have room for."""
        c = self.config.model
        return Lengths(prompt_length=c.prompt_length, response_length=c.response_length)

    def key(self, stage: str, step: int = 0) -> jax.Array:
        """The random key of a stage's step: nothing is drawn twice, nothing hangs on what ran before."""
        stage_key = jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(self._seeded(stage).encode()))
        return jax.random.fold_in(stage_key, step)

    def seed(self, stage: str) -> int:
        """The seed of a stage's batches."""
        return zlib.crc32(f"{self.config.seed}/{self._seeded(stage)}".encode()) % 2**31

    def _seeded(self, stage: str) -> str:
        own = self.config.ppo.seed if stage in ("ppo", "sample ppo") else 0
        return f"{stage}, seed {own}" if own else stage

    def directory(self, stage: str) -> Path:
        """A stage's folder."""
        return self.workdir / ("samples" if stage == "sample" else stage)

    def policy(self, stage: str) -> Top:
        """The policy that a stage trained."""
        if stage == "ppo":
            return self.load("ppo", ActorCritic(top=self.base[1], value=self.head())).top
        return self.load(stage, self.base[1])

    def scorer(self) -> Scorer | Ensemble:
        """The reward model that was trained here, normalised; an ensemble's members each."""
        if init := self.config.reward.init:
            raise UserError(f"config.reward.init={init!r}: the reward model comes from there, none was trained here")
        alone = Scorer(top=self.base[1], head=self.head())
        if (size := self.config.reward.ensemble) == 1:
            trained: Scorer | Ensemble = self.load("reward", alone)
        else:
            members = sharding.place(jax.tree.map(lambda x: jnp.stack([x] * size), alone), self.mesh)
            trained = self.load("reward", Ensemble(members=members, combine="mean", uncertainty_coef=0.0))
        return self.normalised(trained, self.summary("reward")["normalisation"])

    def normalised(self, trained: Scorer | Ensemble, found: Mapping[str, Any]) -> Scorer | Ensemble:
        """The reward model less its mean, over its standard deviation; an ensemble as `config.reward` combines it."""
        if isinstance(trained, Ensemble):
            mean_E, std_E = (jnp.asarray(found[k], jnp.float32) for k in ("mean", "std"))
            members, c = trained.members, self.config.reward
            head = ScalarHead(w_D=members.head.w_D / std_E[:, None], b=(members.head.b - mean_E) / std_E)
            return Ensemble(Scorer(members.top, head), c.combine, c.uncertainty_coef)
        head = ScalarHead(w_D=trained.head.w_D / found["std"], b=(trained.head.b - found["mean"]) / found["std"])
        return Scorer(top=trained.top, head=head)

    def head(self) -> ScalarHead:
        """A read-out of zeros, on the mesh."""
        return sharding.place(
            ScalarHead(w_D=jnp.asarray(np.zeros(self.arch.width, np.float32)), b=jnp.asarray(np.float32(0))), self.mesh
        )

    def load(self, stage: str, like: Any) -> Any:
        """What a finished stage trained."""
        if not self.finished(stage):
            raise UserError(f"{self.workdir}: stage {stage!r} is not finished; run `jaxrlhf {stage}` first")
        steps = self.summary(stage)["steps"]
        kept = self.remote or Workdir(self.workdir)
        return checkpoint.load_params(kept.checkpoints(stage), steps, like, self.meta(stage))

    def finished(self, stage: str) -> bool:
        """Whether a stage has written its summary, which it does last."""
        return hosts.decided((self.directory(stage) / "summary.json").exists)

    def summary(self, stage: str) -> dict[str, Any]:
        """A finished stage's final numbers."""
        return hosts.decided(lambda: read_json(self.directory(stage) / "summary.json"))

    def finish(self, stage: str, summary: Mapping[str, Any]) -> None:
        """Marks a stage as complete, with its final numbers."""
        write_json(self.directory(stage) / "summary.json", summary)


def architecture(config: Experiment, vocab_size: int) -> model.Architecture:
    """The decoder's sizes and options from the config; `UserError` for an unknown family or sizes that do not fit."""
    c = config.model
    if c.family not in model.FAMILIES:
        raise UserError(f"config.model.family={c.family!r}: known are {', '.join(model.FAMILIES)}")
    if c.width % c.heads or c.heads % (c.kv_heads or c.heads):
        raise UserError(
            f"config.model: width={c.width} must divide by heads={c.heads}, and heads by kv_heads={c.kv_heads}"
        )
    options: dict[str, Any] = dict(model.FAMILIES[c.family])
    if c.family == "gemma2":  # what hangs on sizes, as Gemma Team 2024, table 1 and s. 2, and its configs have it
        windows = tuple(0 if i % 2 else 4096 for i in range(c.layers))
        options |= {"windows": windows, "query_scalar": c.width // c.heads}
    return model.Architecture(
        vocab_size=vocab_size,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        kv_heads=c.kv_heads or c.heads,
        head_width=c.width // c.heads,
        ff_width=c.ff_width,
        max_positions=c.prompt_length + c.response_length,
        dtype=c.dtype,
        remat=c.remat,
        **options,
    )


def imported_architecture(config: Experiment, directory: Path, vocab_size: int) -> model.Architecture:
    """The decoder of a Hugging Face directory; `UserError` if the texts of this experiment do not fit it."""
    arch = replace(weights.architecture(directory), dtype=config.model.dtype, remat=config.model.remat)
    if vocab_size > arch.vocab_size:
        raise UserError(
            f"config.model.init={config.model.init!r} has embeddings for {arch.vocab_size} tokens, its tokenizer "
            f"{vocab_size}: save the model after resize_token_embeddings({vocab_size})"
        )
    length = config.model.prompt_length + config.model.response_length
    if arch.positions == "learned" and length > arch.max_positions:
        raise UserError(
            f"config.model.prompt_length + response_length = {length}, but {config.model.init!r} has positions for "
            f"{arch.max_positions} tokens"
        )
    return arch


def base_params(run: Run) -> Params:
    """The base model: imported, shipped with the package, or what `pretrain` left in this workdir."""
    if run.config.model.init:
        return weights.load(run.imported, run.mesh)[1]
    name = run.config.pretrain.init
    if name == "scratch":
        like = sharding.place(model.init(run.arch, run.key("init")), run.mesh)
        return run.load("pretrain", like)
    path = ASSETS / f"{name}.safetensors"
    if not path.exists():
        known = ", ".join(["scratch", *sorted(p.stem for p in ASSETS.glob("*.safetensors"))])
        raise UserError(f"config.pretrain.init={name!r}: known are {known}")
    params, _ = weights.load_params(path)
    wanted = jax.eval_shape(lambda: model.init(run.arch, jax.random.key(0)))
    shapes = [jax.tree.map(lambda x: x.shape, t) for t in (params, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"config.model does not fit the base {name!r}; keep its sizes, or make one: --config.pretrain.init=scratch"
        )
    return params
