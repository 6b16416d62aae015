"""What goes out to and comes in from Hugging Face directories: `jaxrlhf export` and `jaxrlhf import`."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxrlhf
from jaxrlhf import card, checkpoint, hub, model, names, weights
from jaxrlhf import config as configs
from jaxrlhf.config import Experiment
from jaxrlhf.data import task, tokens
from jaxrlhf.experiment import Run
from jaxrlhf.files import UserError, read_json, whole_folder, write_json, write_text
from jaxrlhf.split import pieces
from jaxrlhf.types import Frozen, Params, Scorer, Top

MARK = "jaxrlhf.json"  # tells a directory of ours from anybody's
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER = (
    *tokens.FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)


def export(workdir: Path, policy: str, to: Path) -> None:
    """Writes a policy or the reward model of a workdir as a Hugging Face directory, whole or not at all.

    Args:
      workdir: whose stage that trained it is finished.
      policy: of card.TITLES.
      to: a new or empty folder, or one that an export wrote.

    Raises:
      UserError: no such policy, its stage is not finished, or `to` holds something else.
    """
    if policy not in card.TITLES:
        hint = "; best-of-N is no model: export sft, and reward to pick by" if policy == "bon" else ""
        raise UserError(f"--policy={policy}: known are {', '.join(card.TITLES)}{hint}")
    _check_target(to)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: no run was begun there; first `jaxrlhf run --config=RECIPE --workdir={workdir}`")
    config = configs.read(workdir / "config.json")
    if policy == "reward" and (size := config.reward.ensemble) > 1:
        raise UserError(
            f"--policy=reward: an ensemble of {size} is no single model; a workdir with --config.reward.ensemble=1 has "
            "its first member"
        )
    run = _Finished(config, workdir, task.Task(task.tokenizer(config, workdir)), f"export {policy}")
    for stage in _stages(policy):
        if not run.finished(stage):
            raise UserError(f"{workdir}: stage {stage!r} is not finished; run `jaxrlhf {stage}` first, with its recipe")
    with whole_folder(to.resolve()) as folder:
        write = _write_reward if policy == "reward" else _write_policy
        write(run, policy, folder)
        write_text(folder / "README.md", card.card(_told(run, policy)))
        write_json(folder / MARK, {"version": jaxrlhf.__version__, "policy": policy})


class _Finished(Run):
    """A run that trains no more: of the base's TOP only shapes and places stay, for what was trained to come in by."""

    @cached_property
    def base(self) -> tuple[Frozen, Top]:
        frozen, top = super().base
        return frozen, checkpoint.abstract(top)


def _write_policy(run: Run, policy: str, folder: Path) -> None:
    tokenizer = tokens.save_files(run.task.tokenizer, folder, "left")
    special = _special(tokenizer)
    weights.export(folder, run.arch, pieces(run.base[0], run.policy(policy)), special)
    write_json(folder / "generation_config.json", special | _generation(run.config))


def _write_reward(run: Run, policy: str, folder: Path) -> None:
    # Where end-of-text pads, transformers would read the token before it, and not it (PROTOCOL D15).
    tokenizer = tokens.save_files(run.task.tokenizer, folder, "right", pad=True)
    scorer = run.scorer()
    assert isinstance(scorer, Scorer)
    arch, params = _with_row(run.arch, pieces(run.base[0], scorer.top), tokenizer)
    weights.export_reward(folder, arch, params, scorer.head, _special(tokenizer))


def import_base(source: str, workdir: Path) -> str:
    """Checks a Hugging Face directory or hub id and copies it to `workdir`/base; returns what it holds, in lines.

    Every tensor is read once. Recipes that run in this workdir start from it, unless `config.model.init` names another.

    Raises:
      UserError: it is not to be had, not whole, of an unknown family, or without a tokenizer; or a base is there.
    """
    base = workdir / "base"
    for path, what in ((base, "a base is there"), (workdir / "config.json", "a run was begun there")):
        if path.exists():
            raise UserError(f"{path}: {what} already; take another --workdir")
    directory = hub.directory_of(source, "--from")
    commit = hub.commit_of(directory)
    arch, params = weights.load(directory)
    tokenizer = tokens.pretrained(directory)
    if tokenizer.size > arch.vocab_size:
        raise UserError(f"{directory}: its tokenizer has {tokenizer.size} ids, its embeddings {arch.vocab_size} rows")
    with whole_folder(base) as folder:
        for path in sorted({p for pattern in (*WEIGHTS, *TOKENIZER) for p in directory.glob(pattern)}):
            shutil.copyfile(path, folder / path.name)
        write_json(folder / MARK, {"version": jaxrlhf.__version__, "base": source if commit else "", "commit": commit})
    kinds = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    chat = tokenizer.theirs is not None and tokenizer.theirs.chat_template
    return "\n".join(
        (
            *([f"from           {source} at commit {commit}"] if commit else []),
            f"family         {arch.family}, {arch.layers} layers of width {arch.width}, {arch.heads} heads",
            f"parameters     {_count(params):,} ({', '.join(kinds)})",
            f"tokenizer      {tokenizer.size} ids, bos {'added to prompts' if tokenizer.bos else 'not added'}, "
            f"padding {'by end-of-text' if tokenizer.pad_id == tokenizer.eos_id else 'of its own'}",
            f"chat template  {'yes: --config.files.prompt=chat uses it' if chat else 'none'}",
        )
    )


def _check_target(to: Path) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not to.is_dir():
        raise UserError(f"--to={to}: a file stands there; name a folder")
    ours = {MARK, "README.md", *(p.name for pattern in (*WEIGHTS, *TOKENIZER) for p in to.glob(pattern))}
    if not (to / MARK).exists() or (strange := sorted({p.name for p in to.iterdir()} - ours)):
        other = f" ({strange[0]})" if (to / MARK).exists() else ""
        raise UserError(f"--to={to}: it holds what no export wrote{other}; name a new folder")


def _special(tokenizer: tokens.Tokenizer) -> dict[str, int | None]:
    bos = tokenizer.theirs.bos_token_id if tokenizer.theirs is not None else None
    return {"bos_token_id": bos, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _generation(config: Experiment) -> dict[str, Any]:
    """How the policy was sampled for measurement. `top_k` is said even where it is off: transformers' default is 50."""
    c = config.sampling
    if c.temperature == 0:
        return {"do_sample": False, "max_new_tokens": config.model.response_length}
    drawn = {"do_sample": True, "temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p}
    return drawn | {"max_new_tokens": config.model.response_length}


def _with_row(
    arch: model.Architecture, params: Params, tokenizer: tokens.Tokenizer
) -> tuple[model.Architecture, Params]:
    """A row of embeddings for a padding token that the tokenizer was given, where there is none; nothing reads it."""
    missing = tokenizer.size - arch.vocab_size
    if missing <= 0:
        return arch, params
    table_VD = jnp.pad(params["embed"]["tokens"], ((0, missing), (0, 0)))
    embed = params["embed"] | {"tokens": jax.device_get(table_VD)}
    return dataclasses.replace(arch, vocab_size=tokenizer.size), params | {"embed": embed}


def _stages(policy: str) -> list[str]:
    """The stages on this base that a model comes from; DPO learns from the reward model's pairs, and not from it."""
    return [s for s in names.behind(policy)[1:] if (policy, s) != ("dpo", "reward")]


def _told(run: Run, policy: str) -> card.Told:
    results = run.workdir / "results.json"
    init, mark = run.config.model.init, run.workdir / "base" / MARK
    if init == "base":
        init = read_json(mark)["base"] if mark.exists() else ""
    return card.Told(
        policy=policy,
        config=run.config,
        family=run.arch.family,
        parameters=_count(run.base),
        base="" if Path(init).exists() else init,
        summaries={stage: read_json(run.directory(stage) / "summary.json") for stage in _stages(policy)},
        results=read_json(results) if results.exists() else {},
    )


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
