"""From a recipe and the command line's overrides to a checked `Experiment`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxrlhf.config import Experiment, build
from jaxrlhf.evaluation.judge import check, reads_texts
from jaxrlhf.files import UserError
from jaxrlhf.names import CLIMBERS, METHODS, TRAINED

MODEL_SIZES = ("layers", "width", "heads", "ff_width", "prompt_length", "response_length")


def parse(argv: list[str], values: flags.FlagValues) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config that `--config=recipe.py[:arg]` and `--config.a.b=value` give, locked, and words that are no flag.

    Raises:
      UserError: no such recipe or one that does not run, an unknown key (names the nearest known one), or a value of
        the wrong type.
    """
    path = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), "")
    if not path:
        raise UserError("--config=RECIPE is missing, for example --config=configs/quickstart.py")
    if not Path(path.split(":", 1)[0]).is_file():
        raise UserError(f"--config={path}: no such file {path.split(':', 1)[0]}")
    known = _recipe(argv[0], path)
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        extra = values(argv)[1:]
        return cast(ml_collections.ConfigDict, values["config"].value), extra
    except (AttributeError, KeyError):
        raise UserError(_unknown_key(argv, known)) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).strip().splitlines()[-1].split())) from None


def _recipe(program: str, path: str) -> ml_collections.ConfigDict:
    """What a recipe gives without overrides; `UserError` if it does not run."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[program, f"--config={path}"])
    try:
        values([program, f"--config={path}"])
        config = values["config"].value
    except ValueError as error:  # a recipe's own word on its argument
        raise UserError(" ".join(str(error).strip().splitlines()[-1].split())) from None
    except Exception as error:  # whatever a user's file raises
        raise UserError(f"--config={path}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={path}: its get_config must return the ConfigDict of jaxrlhf.config.default()")
    return config


def _unknown_key(argv: list[str], config: ml_collections.ConfigDict) -> str:
    known = list(_leaves(config.to_dict()))
    for arg in argv:
        key = re.sub(r"^--?(config\.)", "", arg.split("=", 1)[0])
        if re.match(r"--?config\.", arg) and key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)[0]
            return f"config.{key}: no such key; the nearest is config.{near}"
    return "the recipe sets a key that jaxrlhf/config.py does not have"


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def resolve(config: ml_collections.ConfigDict) -> Experiment:
    """The frozen dataclasses of a ConfigDict; `UserError` for values that no stage could work with."""
    experiment: Experiment = build(Experiment, config.to_dict(), "config")
    _check(experiment)
    return experiment


def _check(e: Experiment) -> None:
    positive = {
        "sampling.batch_size": e.sampling.batch_size,
        "sampling.samples_per_prompt": e.sampling.samples_per_prompt,
        "sampling.best_of": e.sampling.best_of,
        "ppo.epochs": e.ppo.epochs,
        "ppo.minibatches": e.ppo.minibatches,
        "reward.normalise_samples": e.reward.normalise_samples,
        "evaluation.bootstrap": e.evaluation.bootstrap,
    }
    positive |= {f"{s}.minibatches": getattr(e, s).minibatches for s in ("rloo", "grpo")}
    positive |= {"grpo.epochs": e.grpo.epochs, "reward.ensemble": e.reward.ensemble}
    for stage in TRAINED:
        section, keys = getattr(e, stage), ("steps", "log_every", "save_every", "keep")
        positive |= {f"{stage}.batch_size": section.batch_size}
        positive |= {f"{stage}.optim.accumulate": section.optim.accumulate}
        positive |= {f"{stage}.loop.{k}": getattr(section.loop, k) for k in keys}
    positive |= {f"model.{k}": getattr(e.model, k) for k in MODEL_SIZES}
    positive |= {f"world.{k.name}": getattr(e.world, k.name) for k in dataclasses.fields(e.world)[:-1]}
    for key, value in positive.items():
        if value < 1:
            raise UserError(f"config.{key}={value}: must be at least 1")
    _check_ranges(e)
    if e.reward.samples_per_prompt < 2:
        raise UserError(f"config.reward.samples_per_prompt={e.reward.samples_per_prompt}: a pair takes 2 or more")
    _check_methods(e)
    if e.evaluation.cut_words < 0:
        raise UserError(f"config.evaluation.cut_words={e.evaluation.cut_words}: must be 0 (automatic) or more")
    if not 0 <= e.model.freeze_layers <= 1:
        raise UserError(f"config.model.freeze_layers={e.model.freeze_layers}: a share from 0 to 1")
    if e.model.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.model.dtype={e.model.dtype!r}: known are float32, bfloat16")
    if e.model.remat not in ("none", "full", "dots", "dots_no_batch"):
        raise UserError(f"config.model.remat={e.model.remat!r}: known are none, full, dots, dots_no_batch")
    if e.task not in ("world", "files", "datasets"):
        raise UserError(f"config.task={e.task!r}: known are world, files, datasets")
    if reads_texts(e.evaluation.judge):
        check(e.evaluation.text_judge)
    elif e.evaluation.judge not in ("gold", "reward"):
        raise UserError(
            f"config.evaluation.judge={e.evaluation.judge!r}: known are gold, reward, length, openai:MODEL, "
            "reward:DIRECTORY"
        )
    if e.evaluation.judge == "gold" and e.task != "world":
        raise UserError("config.evaluation.judge='gold': only the embedded world has a gold judge; take 'reward'")


def _check_methods(e: Experiment) -> None:
    if e.ppo.value_init == "reward" and (e.reward.init or e.reward.ensemble > 1):
        whose = (
            "the head of config.reward.init reads another model's states" if e.reward.init else "each member has one"
        )
        raise UserError(f"config.ppo.value_init='reward': {whose}; take zero or normal")
    if e.reward.init and e.reward.ensemble > 1:
        raise UserError(f"config.reward.ensemble={e.reward.ensemble}: config.reward.init is one reward model; take 1")
    known = {
        "reward.combine": (e.reward.combine, ("mean", "worst", "uncertainty")),
        "dpo.loss": (e.dpo.loss, ("sigmoid", "ipo")),
    }
    unknown = [m.strip() for m in e.methods.split(",") if m.strip() not in ("", *METHODS)]
    known |= {"methods": (unknown[0], METHODS)} if unknown else {}
    for key, (value, values) in known.items():
        if value not in values:
            raise UserError(f"config.{key}={value!r}: known are {', '.join(values)}")
    for stage in ("rloo", "grpo"):
        if (samples := getattr(e, stage).samples) < 2:
            raise UserError(f"config.{stage}.samples={samples}: a baseline takes 2 or more")


def _check_ranges(e: Experiment) -> None:
    ranges = {
        "seed": (e.seed, 0, 2**31 - 1),
        "ppo.seed": (e.ppo.seed, 0, 2**31 - 1),
        "sft.prompt_weight": (e.sft.prompt_weight, 0, 1e6),
        "reward.temperature": (e.reward.temperature, 1e-6, 1e6),
        "world.annotator_temperature": (e.world.annotator_temperature, 1e-6, 1e6),
        "ppo.forward_kl_coef": (e.ppo.forward_kl_coef, 0, 1e6),
        "reward.uncertainty_coef": (e.reward.uncertainty_coef, 0, 1e6),
        "dpo.beta": (e.dpo.beta, 1e-6, 1e6),
        "grpo.clip": (e.grpo.clip, 0, 1),
        "sampling.temperature": (e.sampling.temperature, 0, 1e6),
        "sampling.top_p": (e.sampling.top_p, 1e-6, 1),
    }
    ranges |= {f"ppo.{k}": (getattr(e.ppo, k), 0, 1) for k in ("gamma", "lam")}
    ranges |= {f"{s}.kl_coef": (getattr(e, s).kl_coef, 0, 1e6) for s in CLIMBERS}
    ranges |= {f"{s}.optim.lr": (getattr(e, s).optim.lr, 0, 1e3) for s in TRAINED}
    for key, (value, low, high) in ranges.items():
        if not low <= value <= high:  # NaN is in no range
            raise UserError(f"config.{key}={value}: must be from {low:g} to {high:g}")
