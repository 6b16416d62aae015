"""Values that no stage could work with, refused before the first stage: its own word would come after hours of others.

And by then the workdir belongs to the mistake.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh as DeviceMesh

from jaxrlhf import sharding
from jaxrlhf.config import Experiment
from jaxrlhf.evaluation import judge
from jaxrlhf.files import UserError
from jaxrlhf.names import CLIMBERS, METHODS, TRAINED

MODEL_SIZES = ("layers", "width", "heads", "ff_width", "prompt_length", "response_length")
LARGE = 1e6
BYTES = 256  # words of a byte-level tokenizer before it has learnt any


def check(e: Experiment) -> None:
    """`UserError` for the first value that is out of range, unknown, or does not go with another."""
    for key, value in _counts(e).items():
        if value < 1:
            raise UserError(f"config.{key}={value}: must be at least 1")
    for key, (value, low, high) in _ranges(e).items():
        if not low <= value <= high:  # NaN is in no range
            above = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise UserError(f"config.{key}={value}: must be {above}")
    for key, (value, known) in _words(e).items():
        if value not in known:
            raise UserError(f"config.{key}={value!r}: known are {', '.join(known)}")
    _check_judge(e)
    _check_reward(e)
    _check_rollouts(e)
    if (s := e.sampling).pool < max(s.best_of, s.samples_per_prompt):
        raise UserError(
            f"config.sampling.pool={s.pool} must be at least best_of={s.best_of} and samples_per_prompt="
            f"{s.samples_per_prompt}"
        )


def divides(e: Experiment, stages: Sequence[str], mesh: DeviceMesh) -> None:
    """`UserError` if a batch of one of the stages, or a part of it, does not divide over the mesh."""
    for stage in stages:
        if stage in TRAINED:
            section = getattr(e, stage)
            parts = 1 if stage in CLIMBERS else section.optim.accumulate
            sharding.check_divides(f"config.{stage}.batch_size", section.batch_size, mesh, parts)
        if stage in ("reward", "sample"):
            sharding.check_divides("config.sampling.batch_size", e.sampling.batch_size, mesh)


def _counts(e: Experiment) -> dict[str, int]:
    counts = {
        "sampling.batch_size": e.sampling.batch_size,
        "sampling.samples_per_prompt": e.sampling.samples_per_prompt,
        "sampling.best_of": e.sampling.best_of,
        "ppo.epochs": e.ppo.epochs,
        "ppo.kl_horizon": e.ppo.kl_horizon,
        "grpo.epochs": e.grpo.epochs,
        "reward.normalise_samples": e.reward.normalise_samples,
        "reward.ensemble": e.reward.ensemble,
        "evaluation.bootstrap": e.evaluation.bootstrap,
        "datasets.length": e.datasets.length,
    }
    counts |= {f"{s}.minibatches": getattr(e, s).minibatches for s in CLIMBERS}
    for stage in TRAINED:
        section, keys = getattr(e, stage), ("steps", "log_every", "save_every", "keep")
        counts |= {f"{stage}.batch_size": section.batch_size}
        counts |= {f"{stage}.optim.accumulate": section.optim.accumulate}
        counts |= {f"{stage}.loop.{k}": getattr(section.loop, k) for k in keys}
    counts |= {f"model.{k}": getattr(e.model, k) for k in MODEL_SIZES}
    return counts | {f"world.{k.name}": getattr(e.world, k.name) for k in dataclasses.fields(e.world)[:-1]}


def _ranges(e: Experiment) -> dict[str, tuple[float, float, float]]:
    any_number, not_negative, more = (-LARGE, LARGE), (0, LARGE), (0, math.inf)
    ranges: dict[str, tuple[float, float, float]] = {
        "seed": (e.seed, 0, 2**31 - 1),
        "model.freeze_layers": (e.model.freeze_layers, 0, 1),
        "pretrain.prompt_weight": (e.pretrain.prompt_weight, *not_negative),
        "sft.prompt_weight": (e.sft.prompt_weight, *not_negative),
        "reward.samples_per_prompt": (e.reward.samples_per_prompt, 2, math.inf),  # a pair takes two
        "reward.temperature": (e.reward.temperature, 1e-6, LARGE),
        "reward.uncertainty_coef": (e.reward.uncertainty_coef, *not_negative),
        "world.annotator_temperature": (e.world.annotator_temperature, 1e-6, LARGE),
        "dpo.beta": (e.dpo.beta, 1e-6, LARGE),
        "grpo.clip": (e.grpo.clip, 0, 1),
        "sampling.temperature": (e.sampling.temperature, *not_negative),
        "sampling.top_k": (e.sampling.top_k, *more),
        "sampling.top_p": (e.sampling.top_p, 1e-6, 1),
        "files.evaluation_prompts": (e.files.evaluation_prompts, *more),
        "files.vocab_size": (e.files.vocab_size, BYTES, math.inf),
        "datasets.evaluation_prompts": (e.datasets.evaluation_prompts, *more),
        "datasets.evaluation_pairs": (e.datasets.evaluation_pairs, *more),
        "datasets.vocab_size": (e.datasets.vocab_size, BYTES, math.inf),
        "evaluation.cut_words": (e.evaluation.cut_words, *more),
        "ppo.seed": (e.ppo.seed, 0, 2**31 - 1),
        "ppo.gamma": (e.ppo.gamma, 0, 1),
        "ppo.lam": (e.ppo.lam, 0, 1),
        "ppo.clip": (e.ppo.clip, 0, 1),
    }
    ranges |= {
        f"ppo.{k}": (getattr(e.ppo, k), *not_negative)
        for k in ("value_clip", "value_coef", "kl_target", "forward_kl_coef")
    }
    ranges |= {
        f"ppo.{k}": (getattr(e.ppo, k), *any_number)
        for k in ("entropy_coef", "length_penalty", "eos_bonus", "eos_missing")
    }
    # A baseline takes two responses; a rollout is sampled.
    ranges |= {f"{s}.samples": (getattr(e, s).samples, 2, math.inf) for s in ("rloo", "grpo")}
    ranges |= {f"{s}.kl_coef": (getattr(e, s).kl_coef, *not_negative) for s in CLIMBERS}
    ranges |= {f"{s}.temperature": (getattr(e, s).temperature, 1e-6, LARGE) for s in CLIMBERS}
    for stage in TRAINED:
        o = getattr(e, stage).optim
        ranges |= {f"{stage}.loop.eval_every": (getattr(e, stage).loop.eval_every, *more)}
        ranges |= {f"{stage}.optim.{k}": (getattr(o, k), 0, 1) for k in ("b1", "b2", "eps")}
        ranges |= {f"{stage}.optim.{k}": (getattr(o, k), 0, 1e3) for k in ("lr", "weight_decay")}
        ranges |= {f"{stage}.optim.{k}": (getattr(o, k), *more) for k in ("warmup", "clip_norm")}
    return ranges


def _words(e: Experiment) -> dict[str, tuple[str, Sequence[str]]]:
    words: dict[str, tuple[str, Sequence[str]]] = {
        "task": (e.task, ("world", "files", "datasets")),
        "model.dtype": (e.model.dtype, ("float32", "bfloat16")),
        "model.remat": (e.model.remat, ("none", "full", "dots", "dots_no_batch")),
        "reward.combine": (e.reward.combine, ("mean", "worst", "uncertainty")),
        "ppo.kl_estimator": (e.ppo.kl_estimator, ("k1", "k2", "k3")),
        "ppo.value_init": (e.ppo.value_init, ("zero", "normal", "reward")),
        "dpo.loss": (e.dpo.loss, ("sigmoid", "ipo")),
    }
    words |= {f"{s}.optim.schedule": (getattr(e, s).optim.schedule, ("constant", "linear", "cosine")) for s in TRAINED}
    unknown = [m.strip() for m in e.methods.split(",") if m.strip() not in ("", *METHODS)]
    return words | ({"methods": (unknown[0], METHODS)} if unknown else {})


def _check_judge(e: Experiment) -> None:
    c = e.evaluation
    if judge.reads_texts(c.judge):
        judge.check(c.text_judge)
    elif c.judge not in ("gold", "reward"):
        raise UserError(
            f"config.evaluation.judge={c.judge!r}: known are gold, reward, length, openai:MODEL, reward:DIRECTORY"
        )
    if c.judge == "gold" and e.task != "world":
        raise UserError("config.evaluation.judge='gold': only the embedded world has a gold judge; take 'reward'")


def _check_reward(e: Experiment) -> None:
    if e.ppo.value_init == "reward" and (e.reward.init or e.reward.ensemble > 1):
        whose = (
            "the head of config.reward.init reads another model's states" if e.reward.init else "each member has one"
        )
        raise UserError(f"config.ppo.value_init='reward': {whose}; take zero or normal")
    if e.reward.init and e.reward.ensemble > 1:
        raise UserError(f"config.reward.ensemble={e.reward.ensemble}: config.reward.init is one reward model; take 1")


def _check_rollouts(e: Experiment) -> None:
    for stage, samples in (("ppo", 1), ("rloo", e.rloo.samples), ("grpo", e.grpo.samples)):
        c = getattr(e, stage)
        if c.batch_size * samples % c.minibatches:
            times = f" x config.{stage}.samples={samples}" if samples > 1 else ""
            raise UserError(
                f"config.{stage}.batch_size={c.batch_size}{times} does not divide into "
                f"config.{stage}.minibatches={c.minibatches}; "
                f"batch_size={c.batch_size // c.minibatches * c.minibatches or c.minibatches} would"
            )
        rows, parts = c.batch_size * samples // c.minibatches, c.optim.accumulate
        if rows % parts:
            raise UserError(
                f"config.{stage}.optim.accumulate={parts}: a minibatch's {rows} responses do not divide into as many "
                "parts"
            )
