"""A task: its tokenizer, its training data, its evaluation splits, and its gold judge where it has one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

import jaxrlhf
from jaxrlhf import hub
from jaxrlhf.config import Experiment
from jaxrlhf.data import builders, instructions, kept, selection, tokens, world, world_words
from jaxrlhf.files import read_text, whole_folder, write_json, write_text

Records = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """What the stages take from a task. Records are {id, prompt, response, ...}, all text."""

    tokenizer: tokens.Tokenizer
    documents: Callable[[], Records] = tuple  # for pretraining, made when asked for
    held_out_documents: Callable[[], Records] = tuple
    demonstrations: Records = ()
    validation: Records = ()
    preference_prompts: Records = ()  # whose SFT samples the annotators compare; empty where `preferences` exist
    preferences: Mapping[str, Records] | None = None  # "train" and splits; None where annotators compare SFT samples
    ppo_prompts: Records = ()
    splits: Mapping[str, Records] = field(default_factory=dict)  # evaluation prompts, "id" first, then "ood_..."
    gold: Callable[[str, str, bool], float] | None = None  # (facts, response, finished)
    prefers_first: Callable[[float, float, float, np.random.Generator], bool] | None = None


def load(config: Experiment, workdir: Path, log: Callable[[str], None]) -> Task:
    """The task of a config, its data prepared under `workdir/data`."""
    if config.task == "world":
        return _world(config, workdir)
    return _files(config, workdir, log) if config.task == "files" else _datasets(config, workdir, log)


def _world(config: Experiment, workdir: Path) -> Task:
    c = config.world
    sizes = {
        "demonstrations": c.demonstrations,
        "preference": c.preference_prompts,
        "ppo": c.ppo_prompts,
        "evaluation": c.evaluation_prompts,
    }
    mark = fingerprint(config, sizes)
    splits = builders.prepare(
        lambda folder: builders.World(seed=config.seed, sizes=sizes, data_dir=folder),
        workdir / "data" / "world",
        mark,
        kept.place(f"{mark} {tfds.__version__}", (builders, world, world_words)),
    )
    tokenizer = _imported_tokenizer(config, workdir)
    if tokenizer is None:
        tokenizer = tokens.word_tokenizer(world.VOCABULARY)
        tokenizer.save(workdir / "tokenizer.json")
    return Task(
        tokenizer=tokenizer,
        documents=lambda: [world.document(config.seed, i) for i in range(c.documents)],
        held_out_documents=lambda: [world.document(config.seed, c.documents + i) for i in range(c.evaluation_prompts)],
        demonstrations=splits["demonstrations"],
        validation=splits["validation"],
        preference_prompts=splits["preference"],
        preferences=None,
        ppo_prompts=splits["ppo"],
        splits={s: splits[s] for s in world.SPLITS},
        gold=world.gold,
        prefers_first=world.prefers_first,
    )


def _files(config: Experiment, workdir: Path, log: Callable[[str], None]) -> Task:
    c, imported = config.files, _imported_tokenizer(config, workdir)
    found = instructions.read(c, config.seed, imported)
    log("files: " + ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.notes.items()))
    write_json(workdir / "data" / "notes.json", found.notes)
    records = {
        "demonstrations": found.demonstrations,
        "validation": found.validation,
        "ppo": found.ppo_prompts,
        **{f"split_{s}": r for s, r in found.splits.items()},
    }
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for ps in instructions.paths(c).values() for p in ps]
    chat = [imported.chat.before, imported.chat.after] if imported and imported.chat else []
    mark = fingerprint(config, dataclasses.asdict(c), hashes, *chat)
    texts = _prepare(records, ("id", "prompt", "response"), workdir / "data" / "texts", mark)
    fields = ("id", "prompt", "chosen", "rejected", "chosen_finished", "rejected_finished")
    pairs = _prepare(found.preferences, fields, workdir / "data" / "pairs", mark)
    return Task(
        tokenizer=imported or _learnt_tokenizer(c.vocab_size, texts["demonstrations"], workdir, mark),
        documents=lambda: texts["demonstrations"],
        held_out_documents=lambda: texts["validation"],
        demonstrations=texts["demonstrations"],
        validation=texts["validation"],
        preference_prompts=(),
        preferences=pairs,
        ppo_prompts=texts["ppo"],
        splits={s: texts[f"split_{s}"] for s in found.splits},
    )


def _datasets(config: Experiment, workdir: Path, log: Callable[[str], None]) -> Task:
    imported = _imported_tokenizer(config, workdir)
    found = selection.select(config.datasets, config.seed, imported, workdir, log)
    write_json(workdir / "data" / "notes.json", found.notes)
    vocab_size = config.datasets.vocab_size
    return Task(
        tokenizer=imported or _learnt_tokenizer(vocab_size, found.demonstrations, workdir, found.mark),
        documents=lambda: found.demonstrations,
        held_out_documents=lambda: found.validation,
        demonstrations=found.demonstrations,
        validation=found.validation,
        preferences=found.preferences,
        ppo_prompts=found.ppo_prompts,
        splits=found.splits,
    )


def tokenizer(config: Experiment, workdir: Path) -> tokens.Tokenizer:
    """The tokenizer that a run in `workdir` works with, without its data; `UserError` if no run was begun there."""
    return _imported_tokenizer(config, workdir) or tokens.load(workdir / "tokenizer.json")


def base_directory(config: Experiment, workdir: Path) -> Path:
    """The Hugging Face directory that `config.model.init` names."""
    if config.model.init == "base":
        return workdir / "base"
    return hub.directory_of(config.model.init, "config.model.init")


def _imported_tokenizer(config: Experiment, workdir: Path) -> tokens.Tokenizer | None:
    """That of `config.model.init`, copied to the workdir once, so that nothing hangs on its directory later."""
    if not config.model.init:
        return None
    folder = workdir / "tokenizer"
    if not folder.exists():
        source = tokens.pretrained(base_directory(config, workdir))
        with whole_folder(folder) as partial:
            tokens.save_files(source, partial)
    found = tokens.pretrained(folder)
    formats = {"world": "", "files": config.files.prompt, "datasets": config.datasets.prompt}
    return tokens.with_chat(found) if formats[config.task] == "chat" else found


def _prepare(
    records: Mapping[str, Records], fields: Sequence[str], folder: Path, mark: str
) -> dict[str, builders.Texts]:
    splits = {name: (lambda found=found: found) for name, found in records.items()}
    return builders.prepare(lambda path: builders.Records(splits=splits, fields=fields, data_dir=path), folder, mark)


def _learnt_tokenizer(vocab_size: int, examples: Records, workdir: Path, mark: str) -> tokens.Tokenizer:
    """Byte-level BPE learnt from the demonstrations, once: what `workdir` holds is taken if it has this mark."""
    path, done = workdir / "tokenizer.json", workdir / "data" / "tokenizer.txt"
    if not (path.exists() and done.exists() and read_text(done) == mark):
        texts = (text for r in examples for text in (r["prompt"], r["response"]))
        tokens.bpe_tokenizer(texts, vocab_size).save(path)
        write_text(done, mark)
    return tokens.load(path)


def fingerprint(config: Experiment, *parts: Any) -> str:
    """What prepared data depends on: another fingerprint, other data."""
    told = [jaxrlhf.__version__, config.seed, config.task, dataclasses.asdict(config.world), *parts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
