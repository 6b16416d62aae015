"""From a recipe and the command line's overrides to a checked `Experiment`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import ml_collections
from absl import flags
from ml_collections import config_flags

from jaxrlhf import checks
from jaxrlhf.config import Experiment, build
from jaxrlhf.files import UserError


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
    checks.check(experiment)
    return experiment
