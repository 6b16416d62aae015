"""The datasets that are known: each one's files, its records' real format, and its TFDS builder.

A row of `DATASETS` says where a dataset is and how one of its raw records becomes rows of text: `id`, the fields of its
prompt, and `response`, or `chosen` and `rejected`. Another dataset is another row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxrlhf
from jaxrlhf.config_data import Source
from jaxrlhf.data import builders, prompts, sources
from jaxrlhf.data.sources import Malformed
from jaxrlhf.files import UserError, read_json, write_json, write_records

Raw = Mapping[str, Any]
ANY = "any"  # the split of files whose records say their split
Row = dict[str, str]


@dataclass(frozen=True)
class Dataset:
    """One dataset. Where `parse` gives a split, that counts, and not the one that the file's name says."""

    hub: str  # dataset id; "" = only local files
    folders: tuple[str, ...]  # what the paths of its files on the hub begin with
    names: Mapping[str, str]  # what the file names of each split have in them
    fields: tuple[str, ...]  # of a prompt; () = those of the run's prompt format
    pairs: bool
    prompt: str  # its prompt format
    parse: Callable[[Raw], tuple[str, Row]]  # (split or "", row); raises `Malformed`
    revision: str = ""


def body(row: Mapping[str, str]) -> str:
    """What a row is about, without title and answers: by this, rows count as the same, and are measured.

    `post`, `article` or `prompt`, an instruction with its input, or all other fields but `title` and `subreddit`.
    """
    for name in ("post", "article", "prompt"):
        if row.get(name):
            return row[name]
    if row.get("instruction"):
        return prompts.question(row)
    held = {k: v for k, v in sorted(row.items()) if k not in ("id", "response", "chosen", "rejected")}
    return "\n".join(v for k, v in held.items() if k not in ("title", "subreddit")) or "\n".join(held.values())


def identity(text: str) -> str:
    """A name for a text: equal for texts with the same words, whatever their case, spaces and punctuation."""
    words = " ".join(re.findall(r"\w+", text.casefold())) or text.strip()
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _text(r: Raw, name: str) -> str:
    if not isinstance(r, Mapping) or r.get(name) is None:
        raise Malformed(f"no field {name!r}")
    if not isinstance(r[name], str):
        raise Malformed(f"field {name!r} is {type(r[name]).__name__}, not text")
    # JSON escapes can hold half of a surrogate pair, which no UTF-8 file can.
    return r[name].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _filled(r: Raw, name: str) -> str:
    text = _text(r, name)
    if not text.strip():
        raise Malformed(f"field {name!r} is empty")
    return text


def _tldr(r: Raw) -> tuple[str, Row]:
    row = {name: _filled(r, name) for name in ("id", "subreddit", "post")}
    return "", row | {"title": _text(r, "title"), "response": _filled(r, "summary")}


def _comparison(r: Raw) -> tuple[str, Row]:
    """Stiennon et al. 2020: valid1 was for model selection, valid2 for testing; some records are of CNN/DailyMail."""
    info, choice, summaries = r.get("info"), r.get("choice"), r.get("summaries")
    if not isinstance(info, Mapping):
        raise Malformed("no field 'info' with the post")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise Malformed("field 'summaries' is not a list of two")
    if type(choice) is not int or choice not in (0, 1):
        raise Malformed(f"field 'choice' is {choice!r}, not 0 or 1")
    row = {"id": _filled(info, "id")} | dict.fromkeys(("subreddit", "title", "post", "article"), "")
    row |= {"chosen": _text(summaries[choice], "text"), "rejected": _text(summaries[1 - choice], "text")}
    if info.get("article"):
        return "cnndm", row | {"article": _filled(info, "article")}
    row |= {"subreddit": _filled(info, "subreddit"), "title": _text(info, "title"), "post": _filled(info, "post")}
    split = {"train": "train", "valid1": "validation", "valid2": "test"}.get(r.get("split") or "")
    if split is None:
        raise Malformed(f"field 'split' is {r.get('split')!r}; known are train, valid1, valid2")
    return split, row


def _article(r: Raw) -> tuple[str, Row]:
    return "", {n: _filled(r, n) for n in ("id", "article")} | {"response": _filled(r, "highlights")}


def _asked(r: Raw) -> Row:
    return {
        "instruction": _filled(r, "instruction"),
        "input": _text(r, "input") if r.get("input") is not None else "",
    }


def _instruction(r: Raw) -> tuple[str, Row]:
    row = _asked(r) | {"response": _text(r, "output")}
    return "", {"id": identity(body(row))} | row


def _preference(r: Raw) -> tuple[str, Row]:
    """AlpacaFarm: `preference` says which output won, 1 or 2."""
    row, won = _asked(r), r.get("preference")
    if won not in (1, 2):
        raise Malformed(f"field 'preference' is {won!r}, not 1 or 2")
    outputs = [_text(r, "output_1"), _text(r, "output_2")]
    row |= {"chosen": outputs[int(won) - 1], "rejected": outputs[2 - int(won)]}
    return "", {"id": identity(body(row))} | row


def _sequential(r: Raw) -> tuple[str, Row]:
    """Flat as on the hub, or a seed task of Self-Instruct with its first instance."""
    if "instances" not in r:
        return _instruction(r)
    try:
        first = r["instances"][0]
        given, answer = first["input"], first["output"]
    except (IndexError, KeyError, TypeError):
        raise Malformed("field 'instances' is not a list of {input, output}") from None
    return _instruction({"instruction": r.get("instruction"), "input": given, "output": answer})


def _transcripts(r: Raw) -> tuple[str, Row]:
    """Bai et al. 2022: two transcripts that differ in the last answer; what comes before it is the prompt."""
    sides = [_filled(r, "chosen"), _filled(r, "rejected")]
    turn = "\n\nAssistant:"
    asked, answers = zip(*(s.rpartition(turn)[::2] for s in sides), strict=True)
    if asked[0] != asked[1] or "\n\nHuman:" not in asked[0]:
        raise Malformed("chosen and rejected are not one conversation with two last answers")
    if any("\n\nHuman:" in a for a in answers):
        raise Malformed("a transcript does not end with the assistant")
    row = {"prompt": asked[0] + turn, "chosen": answers[0], "rejected": answers[1]}
    return "", {"id": identity(row["prompt"])} | row


_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_POST = ("subreddit", "title", "post")
_ASK = ("instruction", "input")
DATASETS: dict[str, Dataset] = {
    # The filtered posts of Stiennon et al. 2020: 116 722, 6 447 and 6 553 (PROTOCOL D28).
    "tldr": Dataset("vwxyzjn/summarize_from_feedback_tldr_3_filtered", ("",), _SPLITS, _POST, False, "tldr", _tldr),
    "tldr_comparisons": Dataset(
        "openai/summarize_from_feedback",
        ("comparisons/train/", "comparisons/validation/"),
        {ANY: ""},
        (*_POST, "article"),
        True,
        "tldr",
        _comparison,
        "refs/convert/parquet",
    ),
    "cnn_dailymail": Dataset("abisee/cnn_dailymail", ("3.0.0/",), _SPLITS, ("article",), False, "cnndm", _article),
    "alpaca_farm": Dataset(
        "tatsu-lab/alpaca_farm",
        ("alpaca_instructions/",),
        {"train": "sft", "prompts": "unlabeled", "validation": "val"},
        _ASK,
        False,
        "alpaca",
        _instruction,
    ),
    "alpaca_farm_preferences": Dataset(
        "tatsu-lab/alpaca_farm", ("",), {"train": "human_preference"}, _ASK, True, "alpaca", _preference
    ),
    "alpaca_farm_id_test": Dataset(
        "UCL-DARK/alpaca-farm-id-test", ("",), {"test": ""}, _ASK, False, "alpaca", _instruction
    ),
    "alpaca_eval": Dataset(
        "tatsu-lab/alpaca_eval", ("alpaca_eval.json",), {"test": ""}, _ASK, False, "alpaca", _instruction
    ),
    "sequential_instructions": Dataset(
        "UCL-DARK/sequential-instructions", ("",), {"test": ""}, _ASK, False, "alpaca", _sequential
    ),
    "hh": Dataset(
        "Anthropic/hh-rlhf",
        ("helpful-", "harmless-"),
        {"train": "train", "test": "test"},
        ("prompt",),
        True,
        "{prompt}",
        _transcripts,
    ),
}


def own(name: str, fields: Iterable[str], spec: str) -> Dataset:
    """The row of a user's own dataset: the fields of the run's prompt format, and `response`, or the two of a pair."""
    wanted, pairs, test = tuple(sorted(fields)), name == "own_pairs", name == "own_far"

    def parse(r: Raw) -> tuple[str, Row]:
        row = {f: _text(r, f) for f in wanted}
        row |= {f: _text(r, f) for f in ("subreddit",) if f in r}
        if "instruction" in row and r.get("input"):
            row["input"] = _text(r, "input")
        row |= {f: _text(r, f) for f in ("chosen", "rejected")} if pairs else {"response": _text(r, "response")}
        return "", {"id": _text(r, "id") if isinstance(r.get("id"), str) else identity(body(row))} | row

    names = {"test": ""} if test else _SPLITS
    known = tuple(dict.fromkeys((*wanted, "subreddit", *(("input",) if "instruction" in wanted else ()))))
    return Dataset("", (), names, known, pairs, spec, parse)


@dataclass(frozen=True)
class Prepared:
    """A dataset on disk: its splits, and how many records were passed over as malformed."""

    splits: Mapping[str, builders.Texts]
    malformed: int
    mark: str  # that other records would change


def prepare(
    name: str,
    dataset: Dataset,
    c: Source,
    splits: Collection[str],
    data_dir: Path,
    at_most: float,
    log: Callable[[str], None],
) -> Prepared:
    """A dataset's TFDS splits (array_record), made once for each state of its files.

    Beside them stand `source.json`, with the revision, each file's SHA-256 and the counts, and `malformed.jsonl`, with
    the place and the reason of each record that was passed over. A hub dataset that is there is not asked for again.

    Args:
      name: of the dataset, which is its key in the config.
      dataset: its row.
      c: its source.
      splits: that are needed; those that it does not have are absent from the result.
      data_dir: under which `name`/ holds it.
      at_most: share of records that may be malformed.
      log: told of malformed records.

    Raises:
      UserError: its files are missing or unreadable, or more records are malformed.
    """
    key = f"config.datasets.{name}"
    names = {s: p for s, p in dataset.names.items() if s == ANY or s in splits}
    hub_id, revision = c.hub or dataset.hub, c.revision or dataset.revision
    if not (c.path or hub_id):
        raise UserError(f"{key}.path is empty: it names the file or folder of your records")
    found = sources.local(key, c, names) if c.path else None
    source = found.checksums() if found else [hub_id, revision]
    told = [jaxrlhf.__version__, name, dataset.prompt, dataset.fields, c.fields, sorted(names.items()), source]
    mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    folder = data_dir / name / mark[:16]
    if not (folder / "source.json").exists():
        found = found or sources.hub(key, hub_id, revision, dataset.folders, names)
        rows, malformed = _read(key, dataset, c, found)
        _check(malformed, sum(map(len, rows.values())) + len(malformed), at_most, log)
        _open(dataset, folder, mark, {s: (lambda r=r: r) for s, r in rows.items()})
        write_records(folder / "malformed.jsonl", malformed)
        about = {"from": c.path or hub_id, "revision": found.revision, "files": found.checksums()}
        counts = {"records": {s: len(r) for s, r in rows.items()}, "malformed": len(malformed)}
        write_json(folder / "source.json", about | counts)  # last: with it, all is there
    about = read_json(folder / "source.json")

    def damaged() -> Iterable[Row]:
        raise UserError(f"{folder}: it was prepared, but is not whole any more; delete it, and it is made anew")

    texts = _open(dataset, folder, mark, dict.fromkeys(about["records"], damaged))
    return Prepared(texts, about["malformed"], json.dumps([mark, about["files"]]))


def _open(
    dataset: Dataset, folder: Path, mark: str, rows: Mapping[str, Callable[[], Iterable[Row]]]
) -> dict[str, builders.Texts]:
    """The dataset's TFDS builder at work; `rows` are asked for where it is not prepared yet."""
    fields = ("id", *dataset.fields, *(("chosen", "rejected") if dataset.pairs else ("response",)))

    def filled(make: Callable[[], Iterable[Row]]) -> Callable[[], Iterable[Row]]:
        return lambda: ({f: row.get(f, "") for f in fields} for row in make())

    splits = {s: filled(make) for s, make in rows.items()}
    return builders.prepare(
        lambda path: builders.Records(splits=splits, fields=fields, data_dir=path), folder / "records", mark
    )


def _check(malformed: list[dict[str, str]], total: int, at_most: float, log: Callable[[str], None]) -> None:
    for m in malformed[:5]:
        log(f"{m['where']}: {m['why']}; passed over")
    if len(malformed) > at_most * total:
        raise UserError(
            f"{malformed[0]['where']}: {malformed[0]['why']}; {len(malformed)} of {total} records are malformed, more "
            f"than config.datasets.malformed={at_most:g} allows"
        )


def _read(
    key: str, dataset: Dataset, c: Source, found: sources.Files
) -> tuple[dict[str, list[Row]], list[dict[str, str]]]:
    renamed = _renamed(key, c)
    rows: dict[str, list[Row]] = {}
    malformed, columns = [], set()
    for split, paths in found.by_split.items():
        for where, record in (r for path in paths.values() for r in sources.raw(path)):
            try:
                if isinstance(record, Malformed):
                    raise record
                columns |= record.keys()
                # A field of the map never falls back on a column of its own name.
                kept = {k: v for k, v in record.items() if k not in renamed}
                record = kept | {field: record[column] for field, column in renamed.items() if column in record}
                own, row = dataset.parse(record)
                rows.setdefault(own or split, []).append(row)
            except Malformed as error:
                malformed.append({"where": where, "why": str(error)})
    for field, column in renamed.items():
        if columns and column not in columns:
            raise UserError(
                f"{key}.fields has '{field}={column}', but no record has a column {column!r}; there are "
                f"{', '.join(sorted(columns))}"
            )
    return rows, malformed


def _renamed(key: str, c: Source) -> dict[str, str]:
    for entry in c.fields:
        if not re.fullmatch(r"\w+=.+", entry):
            raise UserError(f"{key}.fields has {entry!r}; it must be field=column")
    return dict(entry.split("=", 1) for entry in c.fields)
