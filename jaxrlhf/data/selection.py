"""From the config's named datasets to the records of each use: prepared, split, and free of what training saw.

The order of the rules. (1) A dataset without a test or validation split gives a share of its training posts to it.
(2) A test, far or validation record whose body is a near-duplicate of any training record's is removed, and so are far
and validation records that repeat a test record: training keeps what it has, and a test set is the same whatever part
or subset of its datasets a run trains on. (3) Training takes the in-distribution part alone, then its random subset.
(4) Test sets fall into in-distribution and out-of-distribution parts, and are limited.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import jaxrlhf
from jaxrlhf.config_data import Datasets, Source
from jaxrlhf.data import datasets, duplicates, prompts, sentiment, splits
from jaxrlhf.data.datasets import Dataset, Prepared, Row
from jaxrlhf.data.tokens import Tokenizer
from jaxrlhf.files import UserError, read_json, write_json, write_records

KEY = "config.datasets"
OWN = ("own", "own_pairs", "own_far")
TRAINING = ("train", "ppo", "pairs_train")


@dataclass(frozen=True)
class Use:
    """Some rows of one split of one dataset."""

    dataset: str
    split: str
    index: list[int]

    def at(self, places: Iterable[int]) -> Use:
        """The rows at these places of it."""
        return dataclasses.replace(self, index=[self.index[i] for i in places])


class View(Sequence[dict[str, str]]):
    """The rows of a use as records, made when they are asked for."""

    def __init__(self, use: Use, rows: Sequence[Row], make: Callable[[Row], Row]):
        self._use, self._rows, self._make = use, rows, make

    def __len__(self) -> int:
        return len(self._use.index)

    @overload
    def __getitem__(self, i: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, str]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, str] | list[dict[str, str]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        place = self._use.index[i]
        return {"id": f"{self._use.dataset}-{self._use.split}-{place}"} | self._make(self._rows[place])


@dataclass(frozen=True)
class Selected:
    """Records of each use, counts of what was passed over, and what all of it depends on."""

    demonstrations: Sequence[Row]
    validation: Sequence[Row]
    ppo_prompts: Sequence[Row]
    preferences: Mapping[str, Sequence[Row]]  # "train", "id", "ood_..."
    splits: Mapping[str, Sequence[Row]]  # "id", "ood_...", and "full" where it is asked for
    notes: Mapping[str, int]
    mark: str


def select(c: Datasets, seed: int, tokenizer: Tokenizer | None, workdir: Path, log: Callable[[str], None]) -> Selected:
    """Prepares the datasets, splits them, and keeps the result in `workdir`/data/splits.json for the next call.

    Args:
      c: which datasets, and how they are split.
      seed: of random shares.
      tokenizer: whose chat template the format `chat` means.
      workdir: the run's.
      log: told what was found.

    Raises:
      UserError: a key is wrong, a file is, or a part has no record.
    """
    _check(c)
    form = prompts.prompts(main_prompt(c), tokenizer, f"{KEY}.prompt")
    known = {name: _row(c, name, tokenizer) for name in _names(c)}
    for name in {c.sft, c.preferences, c.prompts or c.sft, c.test or c.sft}:
        if lacking := form.fields - set(known[name].fields):
            raise UserError(f"{KEY}.prompt asks for {{{min(lacking)}}}; {name} has {', '.join(known[name].fields)}")
    data_dir = Path(c.data_dir) if c.data_dir else workdir / "data"
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{KEY}.data_dir={c.data_dir!r}: it is a file; name a folder")
    found = {
        name: datasets.prepare(name, d, source(c, name), _needed(c, name), data_dir, c.malformed, log)
        for name, d in known.items()
    }
    index = Path(c.sentiment_index).read_bytes() if Path(c.sentiment_index).is_file() else b""
    parts = [jaxrlhf.__version__, seed, dataclasses.asdict(c), [p.mark for p in found.values()]]
    mark = hashlib.sha256(json.dumps(parts, sort_keys=True).encode() + index).hexdigest()
    path = workdir / "data" / "splits.json"
    if not (path.exists() and read_json(path).get("fingerprint") == mark):
        uses, notes = _plan(c, seed, found, workdir / "data")
        plan = {name: dataclasses.asdict(use) for name, use in uses.items()}
        write_json(path, {"fingerprint": mark, "notes": notes, "uses": plan})
    plan = read_json(path)
    uses = {name: Use(**use) for name, use in plan["uses"].items()}
    log("datasets: " + ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in plan["notes"].items()))
    return _views(c, form, tokenizer, found, uses, plan["notes"], mark)


def main_prompt(c: Datasets) -> str:
    """The prompt format of a run's in-distribution records."""
    return c.prompt or (datasets.DATASETS[c.sft].prompt if c.sft in datasets.DATASETS else "")


def source(c: Datasets, name: str) -> Source:
    """The section of a dataset."""
    return getattr(c, name)


def _check(c: Datasets) -> None:
    known = [*datasets.DATASETS, *OWN]
    named = {"sft": c.sft, "preferences": c.preferences, "prompts": c.prompts, "test": c.test}
    named |= {f"far[{i}]": name for i, name in enumerate(c.far)}
    for key, name in named.items():
        if name not in known and (name or key not in ("prompts", "test")):
            raise UserError(f"{KEY}.{key}={name!r}: known are {', '.join(known)}")
    of_pairs = [*(n for n, d in datasets.DATASETS.items() if d.pairs), "own_pairs"]
    if c.preferences not in of_pairs:
        raise UserError(f"{KEY}.preferences={c.preferences!r}: of pairs are {', '.join(of_pairs)}")
    if c.sft not in datasets.DATASETS and not c.prompt:
        raise UserError(f"{KEY}.prompt is empty: say by a format, or a text with {{field}}s, what your records hold")
    for key, low, high in (("held_out", 1e-6, 0.45), ("near_duplicate", 0.05, 1), ("malformed", 0, 1)):
        if not low <= (value := getattr(c, key)) <= high:
            raise UserError(f"{KEY}.{key}={value}: must be from {low:g} to {high:g}")
    if c.sentiment_index and c.split != "sentiment":
        raise UserError(f"{KEY}.sentiment_index is for split=sentiment, but split={c.split!r}")
    splits.in_distribution(c, {})
    splits.subset(1, c.subset, 0, c.subset_with_replacement)


def _names(c: Datasets) -> list[str]:
    return list(dict.fromkeys((c.sft, c.preferences, c.prompts or c.sft, c.test or c.sft, *c.far)))


def _row(c: Datasets, name: str, tokenizer: Tokenizer | None) -> Dataset:
    if name in datasets.DATASETS:
        return datasets.DATASETS[name]
    spec = _far_prompt(c, name) if name in c.far else c.prompt
    return datasets.own(name, prompts.prompts(spec, tokenizer, f"{KEY}.prompt").fields, spec)


def _far_prompt(c: Datasets, name: str) -> str:
    own = name not in datasets.DATASETS
    return c.far_prompt or (main_prompt(c) if own else datasets.DATASETS[name].prompt)


def _needed(c: Datasets, name: str) -> set[str]:
    needed = set()
    if name == c.sft:
        needed |= {"train", "validation"} | (set() if c.test else {"test"})
    if name == c.preferences:
        needed |= {"train", "test", "cnndm"}
    if name == (c.prompts or c.sft):
        needed |= {"train", "prompts"}
    return needed | ({"test"} if name == c.test or name in c.far else set())


def _plan(c: Datasets, seed: int, found: Mapping[str, Prepared], folder: Path) -> tuple[dict[str, Use], dict[str, int]]:
    """Which rows each use has, and the counts of the rest."""
    uses = _uses(c, seed, found)
    rows = {name: [found[u.dataset].splits[u.split][i] for i in u.index] for name, u in uses.items()}
    notes: Counter[str] = Counter(malformed_records=sum(p.malformed for p in found.values()))
    _remove_seen(c, uses, rows, notes, folder)
    inside = splits.in_distribution(c, _labels(c, rows, folder) if c.split == "sentiment" else None)
    chosen: dict[str, Use] = {}
    for name in TRAINING:
        places = _training(name, rows[name], inside, notes)
        picked = splits.subset(len(places), c.subset, seed, c.subset_with_replacement) if places else []
        chosen[name] = uses[name].at(places[i] for i in picked)
    chosen["validation"] = uses["validation"].at(i for i, r in enumerate(rows["validation"]) if inside(r))
    chosen |= _evaluation(c, seed, uses, rows, inside)
    for name, use in list(chosen.items()):
        if not use.index and name.startswith(("pairs_test", "pairs_far")):
            del chosen[name]  # accuracy is not measured there
        elif not use.index:
            raise UserError(f"{KEY}: the part {name!r} (of {use.dataset}, {use.split}) has no record")
    references = [r for name in ("test", *(n for n in uses if n.startswith("far_"))) for r in rows[name]]
    notes["test_records_without_reference"] = sum(not _answer(r).strip() for r in references)
    return chosen, dict(notes)


def _evaluation(
    c: Datasets, seed: int, uses: Mapping[str, Use], rows: Mapping[str, list[Row]], inside: Callable[[Row], bool]
) -> dict[str, Use]:
    """The parts of each test set, limited."""
    places: dict[str, list[int]] = {}
    for name in ("test", "pairs_test"):
        sides = [inside(r) for r in rows[name]]
        places[f"{name}_id"] = [i for i, side in enumerate(sides) if side]
        if c.split != "full":
            places[f"{name}_ood_{c.split}"] = [i for i, side in enumerate(sides) if not side]
    if c.full_test:
        places["test_full"] = list(range(len(rows["test"])))
    places |= {name: list(range(len(rows[name]))) for name in uses if "far_" in name}
    chosen = {}
    for name, among in places.items():
        of = name if name in uses else re.sub("_(id|full|ood_.*)$", "", name)
        at_most = c.evaluation_pairs if name.startswith("pairs") else c.evaluation_prompts
        picked = splits.limited([rows[of][i]["id"] for i in among], at_most, seed)
        chosen[name] = uses[of].at(among[i] for i in picked)
    return chosen


def _uses(c: Datasets, seed: int, found: Mapping[str, Prepared]) -> dict[str, Use]:
    """Every use with all the rows that it could have."""
    lacks = {s for s in _needed(c, c.sft) & set(splits.HELD_OUT) if s not in found[c.sft].splits}

    def use(name: str, split: str) -> Use:
        texts = found[name].splits
        if split in texts and split != "train":
            return Use(name, split, list(range(len(texts[split]))))
        if "train" not in texts:
            if not texts:
                raise UserError(f"{KEY}.{name}: there is no record in it")
            needed = "train" if split == "train" else f"train nor {split}"
            raise UserError(
                f"{KEY}.{name}: files' names say {', '.join(texts)}, but not {needed}; a file is of the split whose "
                "name is a word of its own, a single file that names none is of train"
            )
        held = lacks | {s for s in _needed(c, name) & set(splits.HELD_OUT) if s not in texts}
        keys = [datasets.identity(datasets.body(r)) for r in texts["train"]]
        return Use(name, "train", splits.held_out(keys, c.held_out, seed, sorted(held))[split])

    prompts_of = c.prompts or c.sft
    uses = {
        "train": use(c.sft, "train"),
        "ppo": use(prompts_of, "prompts" if "prompts" in found[prompts_of].splits else "train"),
        "pairs_train": use(c.preferences, "train"),
        "test": use(c.test or c.sft, "test"),
        **{f"far_{name}": use(name, "test") for name in c.far},
        "pairs_test": use(c.preferences, "test"),
        "validation": use(c.sft, "validation"),
    }
    if "cnndm" in found[c.preferences].splits and "cnn_dailymail" in c.far:
        uses["pairs_far_cnn_dailymail"] = use(c.preferences, "cnndm")
    return uses


def _remove_seen(
    c: Datasets, uses: dict[str, Use], rows: dict[str, list[Row]], notes: Counter[str], folder: Path
) -> None:
    """Takes from evaluation what training has, and from far and validation sets what tests before them have."""
    trained = {datasets.body(r): r["id"] for name in TRAINING for r in rows[name]}
    seen: list[dict[str, Any]] = []
    tested: dict[str, str] = {}
    for name in [n for n in uses if n not in TRAINING]:
        apart = {} if name.startswith("pairs") else tested
        texts = list(dict.fromkeys(datasets.body(r) for r in rows[name]))
        known = [*trained.items(), *apart.items()]
        near = duplicates.near(texts, (text for text, _ in known), c.near_duplicate)
        twins = {texts[i]: (*known[j], similarity, j < len(trained)) for i, (j, similarity) in near.items()}
        kept = []
        for i, r in enumerate(rows[name]):
            if (text := datasets.body(r)) not in twins:
                kept.append(i)
                continue
            other, other_id, similarity, in_training = twins[text]
            same = "same" if datasets.identity(other) == datasets.identity(text) else "near"
            notes[f"{name}_records_{same}_as_{'training' if in_training else 'test'}_removed"] += 1
            seen.append({"in": name, "id": r["id"], "of": other_id, "similarity": round(similarity, 4)})
        uses[name], rows[name] = uses[name].at(kept), [rows[name][i] for i in kept]
        texts = {datasets.body(r): r["id"] for r in rows[name]}
        assert not {datasets.identity(t) for t in texts} & {datasets.identity(t) for t in trained | apart}
        if not name.startswith("pairs"):
            tested |= texts
    write_records(folder / "near_duplicates.jsonl", seen)


def _labels(c: Datasets, rows: Mapping[str, list[Row]], folder: Path) -> Mapping[str, bool]:
    if c.sentiment_index:
        return sentiment.read(Path(c.sentiment_index))
    inside = [name for name in rows if "far_" not in name]
    texts = {r["id"]: datasets.body(r) for name in inside for r in rows[name]}
    found, middle = sentiment.labels(texts, (r["id"] for r in rows["train"]))
    sentiment.write(folder / "sentiment.json", found, middle)
    return found


def _training(name: str, rows: list[Row], inside: Callable[[Row], bool], notes: Counter[str]) -> list[int]:
    """Places of the in-distribution rows: with an answer for SFT, each post once for PPO."""
    places = [i for i, r in enumerate(rows) if inside(r)]
    if name == "train":
        empty = {i for i in places if not _answer(rows[i]).strip()}
        notes["empty_demonstrations"] = len(empty)
        return [i for i in places if i not in empty]
    if name == "ppo":
        first = {datasets.identity("\n".join(_asked(rows[i]))): i for i in reversed(places)}
        return sorted(first.values())
    return places


def _answer(r: Row) -> str:
    return r["response"] if "response" in r else r["chosen"]


def _asked(r: Row) -> list[str]:
    return [v for k, v in sorted(r.items()) if k not in ("id", "response", "chosen", "rejected")]


def _views(
    c: Datasets,
    form: prompts.Prompts,
    tokenizer: Tokenizer | None,
    found: Mapping[str, Prepared],
    uses: Mapping[str, Use],
    notes: Mapping[str, int],
    mark: str,
) -> Selected:
    def view(name: str) -> View:
        use, (_, _, far) = uses[name], name.partition("far_")
        made = prompts.prompts(_far_prompt(c, far), tokenizer, f"{KEY}.far_prompt") if far else form
        make = _pair if name.startswith("pairs") else _prompt
        return View(use, found[use.dataset].splits[use.split], lambda r: make(made, r))

    def parts(**renamed: str) -> dict[str, View]:
        return {new + n.removeprefix(old): view(n) for old, new in renamed.items() for n in uses if n.startswith(old)}

    return Selected(
        demonstrations=view("train"),
        validation=view("validation"),
        ppo_prompts=view("ppo"),
        preferences={"train": view("pairs_train"), **parts(pairs_test_="", pairs_far_="ood_")},
        splits=parts(test_="", far_="ood_"),
        notes=notes,
        mark=mark,
    )


def _prompt(form: prompts.Prompts, r: Row) -> Row:
    answer = _answer(r)
    return {"prompt": form.prompt(r), "response": form.response(answer) if answer.strip() else ""}


def _pair(form: prompts.Prompts, r: Row) -> Row:
    sides = {side: form.response(r[side]) for side in ("chosen", "rejected")}
    return {"prompt": form.prompt(r), **sides, "chosen_finished": "1", "rejected_finished": "1"}
