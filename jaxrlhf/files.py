"""Reading what users wrote and writing what they rely on: clear errors in, whole files out.

Nothing here imports JAX, so that measuring other people's outputs starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def writes() -> bool:
    """Whether this process is the one that writes files and speaks: host 0 of several, or the only one."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


class UserError(Exception):
    """The user's input is wrong: one line that names the key or the file and line, and says what would be right."""


class Failure(Exception):
    """Something outside failed, not the user's input: one line that says what, and how to go on."""


def listed(items: Iterable[Any]) -> str:
    """The first few of several things, and how many more there are."""
    items = [str(x) for x in items]
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


class Stopped(Exception):
    """Somebody asked to stop, and all is saved: one line that says how to go on."""


def read_records(path: str | os.PathLike[str], required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The objects of a JSON list (`.json`) or of JSON lines (any other suffix); blank lines are skipped.

    Args:
      path: the file.
      required: fields that every record must have.

    Raises:
      UserError: the file is missing, does not parse, or a record lacks a field; names the file and line or record.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix == ".json":
        located = [(f"{path}, record {i}", r) for i, r in enumerate(_parse_list(path, text), 1)]
    else:
        located = [
            (f"{path}:{number}", _parse_line(path, number, line))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    required = tuple(required)
    for place, record in located:
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object, found {type(record).__name__}")
        for field in required:
            if field not in record:
                raise UserError(f"{place}: no field {field!r}; it has {', '.join(sorted(record)) or 'no field'}")
    return [record for _, record in located]


def read_json(path: str | os.PathLike[str]) -> Any:
    """One JSON document; `UserError` if it is missing or does not parse."""
    path = Path(path)
    return _parse(path, read_text(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file's text, without a byte order mark at its start; `UserError` if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` whole or not at all; keys keep their order, NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_records(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines whole or not at all."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` whole or not at all: to a file beside it, then renamed. Of several hosts, host 0 alone does."""
    if not writes():
        return
    if "://" in str(path):  # in an object store, where a file appears whole
        path.write_text(text, encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Lone surrogates can come out of JSON escapes; as escapes they go back, since UTF-8 cannot hold them.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when all is written, or goes when something fails."""
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier process ended between the two renames below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _parse_list(path: Path, text: str) -> list[Any]:
    records = _parse(path, text)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of records, found {type(records).__name__}")
    return records


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not valid JSON for our purposes (nested too deeply)") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise UserError(f"{path}: the file is empty") from None
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise UserError(f"{path}:{number}: not valid JSON for our purposes (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno})") from None
