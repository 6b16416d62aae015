"""TFDS builders for text records, written as array_record: random access, no TensorFlow."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds

from jaxrlhf.data import kept, world
from jaxrlhf.files import Failure, UserError, read_text, write_text, writes

Record = Mapping[str, str]
Splits = Mapping[str, Callable[[], Iterable[Record]]]


class Records(tfds.core.GeneratorBasedBuilder):
    """Flat records of text in named splits: what JSON and JSONL files hold."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits: Splits, fields: Sequence[str], **kwargs: Any):
        self._splits, self._fields = splits, tuple(fields)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in self._fields})
        # The order of the records is part of the data: batches are a function of it.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {name: self._generate_examples(name, make) for name, make in self._splits.items()}

    def _generate_examples(
        self, split: str, make: Callable[[], Iterable[Record]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        i = -1
        for i, record in enumerate(make()):
            for name in self._fields:
                if not isinstance(record.get(name), str):
                    raise UserError(f"split {split!r}, record {i + 1}: field {name!r} must be there, as text")
            yield i, {name: record[name] for name in self._fields}
        if i < 0:
            raise UserError(f"split {split!r} of the data is empty; it needs at least one record")


class World(Records):
    """The embedded world, from `world.document`, `world.demonstration` and `world.post`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, seed: int, sizes: Mapping[str, int], **kwargs: Any):
        evaluation = sizes["evaluation"]
        splits: dict[str, Callable[[], Iterable[Record]]] = {
            "demonstrations": lambda: (world.demonstration(seed, i) for i in range(sizes["demonstrations"])),
            "validation": lambda: (world.post(seed, "validation", "id", i) for i in range(evaluation)),
            "preference": lambda: (world.post(seed, "preference", "id", i) for i in range(sizes["preference"])),
            "ppo": lambda: (world.post(seed, "ppo", "id", i) for i in range(sizes["ppo"])),
        }
        for split in world.SPLITS:
            splits[split] = lambda split=split: (world.post(seed, "evaluation", split, i) for i in range(evaluation))
        super().__init__(splits=splits, fields=("id", "prompt", "response", "facts"), **kwargs)


class Texts(Sequence[dict[str, str]]):
    """A prepared split: random access, in the order in which it was written, to records as text."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, i: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, str]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, str] | list[dict[str, str]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        record = self._source[range(len(self))[i]]
        return {name: value.decode("utf-8") for name, value in record.items()}


def prepare(
    make: Callable[[str], Records], folder: Path, fingerprint: str, elsewhere: Path | None = None
) -> dict[str, Texts]:
    """The splits of a builder in `folder`, made anew unless what is there has this fingerprint and is whole.

    What is made anew is a copy of what is kept `elsewhere`, see `kept`, or is kept there from now on.

    Raises:
      UserError: a split has no record, or a record lacks a field; nothing is left that a later call would take up.
    """
    done = folder / "fingerprint.txt"
    if not (done.exists() and read_text(done) == fingerprint and make(str(folder)).is_prepared()):
        if not writes():
            raise Failure(f"{folder}: this host does not see yet what host 0 wrote there; the same command goes on")
        shutil.rmtree(folder, ignore_errors=True)
        if elsewhere is None or not kept.take(elsewhere, folder):
            _quietly(lambda: make(str(folder)).download_and_prepare(download_config=_LOCAL))
            if elsewhere is not None:
                kept.keep(folder, elsewhere)
        write_text(done, fingerprint)
    builder: Any = make(str(folder))
    return {name: Texts(builder.as_data_source(split=name)) for name in builder._splits}


_LOCAL = tfds.download.DownloadConfig(try_download_gcs=False)


def _quietly(work: Callable[[], None]) -> None:
    tfds.disable_progress_bar()
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            work()
    finally:
        logging.getLogger("absl").setLevel(level)
