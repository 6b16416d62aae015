"""Where raw records come from: local files, or a hub dataset at a pinned revision; each file with its checksum."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrlhf.config_data import Source
from jaxrlhf.files import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")


class Malformed(Exception):
    """A record that cannot be used; says why."""


@dataclass(frozen=True)
class Files:
    """The files of a source by their split, and the commit that they are of, where they come from the hub."""

    by_split: Mapping[str, Mapping[str, Path]]  # paths by their names relative to the source
    revision: str = ""

    def checksums(self) -> dict[str, dict[str, str]]:
        """SHA-256 of each file, by split and name."""
        return {split: {n: sha256(p) for n, p in files.items()} for split, files in self.by_split.items()}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local(key: str, c: Source, names: Mapping[str, str]) -> Files:
    """The files of `c.path`, which is a file or a folder, searched with its folders.

    Args:
      key: of the config, for errors.
      c: with a path.
      names: what the file names of each split have in them; the first that fits decides. A single file whose name fits
        none belongs to the first split.

    Raises:
      UserError: nothing is there, or no name says a split.
    """
    path = Path(c.path)
    if path.is_file():
        _check_suffix(key, path)
        return Files({_split_of(path.name, names) or next(iter(names)): {path.name: path}})
    if not path.is_dir():
        raise UserError(f"{key}.path={c.path!r}: no such file or folder")
    if not (found := _search(path, names)):
        raise UserError(
            f"{key}.path={c.path!r}: no file there is named for a split; expected {' or '.join(names.values())} in the "
            f"name, and one of {', '.join(SUFFIXES)} at its end"
        )
    return Files(found)


def hub(key: str, identity: str, revision: str, folders: tuple[str, ...], names: Mapping[str, str]) -> Files:
    """Fetches the files of a hub dataset at one commit, or takes them from the hub client's cache.

    Args:
      key: of the config, for errors.
      identity: the dataset's id.
      revision: a commit, or a branch whose newest commit is taken; "" = the main branch.
      folders: what the paths of its files begin with.
      names: of each split that is needed, as for `local`.

    Raises:
      UserError: it is not to be had, or has no such file.
    """
    from huggingface_hub import snapshot_download  # not needed for local files

    where = f"{key}: the hub's dataset {identity!r} at {revision or 'main'!r}"
    patterns = [f"{folder}*{word}*" for folder in folders for word in names.values()]
    try:
        found_at = snapshot_download(
            identity,
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=["*.duckdb"],  # databases that the hub's converter puts beside the Parquet files
        )
    except (OSError, ValueError) as error:  # all that the hub's client raises for want of a name, a right, a network
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is not to be had ({reason}); set {key}.path to a copy") from None
    root = Path(found_at)
    if not (found := _search(root, names, folders)):
        raise UserError(f"{where} has no file for {', '.join(names)}; set {key}.path to a copy")
    return Files(found, root.name)  # the client keeps each commit in a folder of its name


def _search(root: Path, names: Mapping[str, str], folders: tuple[str, ...] = ("",)) -> dict[str, dict[str, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in root.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()):
        name = path.relative_to(root).as_posix()
        if name.startswith(folders) and (split := _split_of(name, names)):
            found.setdefault(split, {})[name] = path
    return found


def raw(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a file with its place, `file:line`, or `file, record n` where there are no lines.

    A record that does not parse comes as a `Malformed`, not raised, so that a reader can count it and go on.

    Raises:
      UserError: the file as a whole cannot be read.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path)
            return
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if ".csv" in path.suffixes[-2:]:
        yield from _csv(path, text)
    elif ".json" in path.suffixes[-2:] and text.lstrip().startswith("["):
        yield from _json_list(path, text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _object(line)


def _json_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    for i, record in enumerate(records, 1):
        yield f"{path}, record {i}", record if isinstance(record, dict) else Malformed("not an object")


def _object(line: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return Malformed(f"not valid JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return Malformed("nested too deeply")
    return record if isinstance(record, dict) else Malformed("not an object")


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # articles are longer than the module's default
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            odd = None in record or None in record.values()
            yield f"{path}:{reader.line_num}", Malformed("another number of columns than the header") if odd else record
    except csv.Error as error:  # after it, nothing says where a record begins
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, record {number}", record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def _split_of(name: str, names: Mapping[str, str]) -> str:
    """The first split whose word is in the name as a word: `test` is not in latest.jsonl, `val` in validation.jsonl."""
    ends = r"(ing|id|idation|s)?(?![a-zA-Z])"
    return next((s for s, word in names.items() if not word or re.search(f"(?<![a-zA-Z]){word}{ends}", name)), "")


def _check_suffix(key: str, path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{key}.path={str(path)!r}: unknown kind of file; known are {', '.join(SUFFIXES)}")
