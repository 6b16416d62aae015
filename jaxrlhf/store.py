"""A workdir in an object store: a local folder that is kept equal to it, and checkpoints that go there directly.

Nothing else needs to know: stages, tokenizers, array_record and figures read and write files. Each process has a folder
of its own, which lasts as long as the command; host 0 sends what changed, the others fetch it before each stage.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from jaxrlhf.files import Failure, Stopped, UserError, writes

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Workdir:
    """Where a run lives: a local folder, and the place in an object store that it stands for, if any."""

    local: Path
    remote: epath.Path | None = None
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict)  # size and time of each file that is there

    def checkpoints(self, stage: str) -> Path | epath.Path:
        """Where a stage's checkpoints lie."""
        return (self.remote or self.local) / stage / CHECKPOINTS

    def named(self, words: object) -> str:
        """What is said of the local folder, said of what it stands for."""
        return str(words).replace(str(self.local), str(self.remote or self.local))

    def fetch(self) -> None:
        """Copies here what is there, checkpoints apart."""
        if self.remote is None:
            return
        with _told(self.remote):
            for path in files(self.remote, CHECKPOINTS) if self.remote.exists() else ():
                here = self.local / path.relative_to(self.remote)
                here.parent.mkdir(parents=True, exist_ok=True)
                path.copy(here, overwrite=True)
        self._sent.update(self._found())

    def send(self) -> None:
        """Copies there what has changed here, and removes what is gone. Of several hosts, host 0 alone does."""
        if self.remote is None or not writes():
            return
        found = self._found()
        with _told(self.remote):
            for name in (n for n, mark in found.items() if self._sent.get(n) != mark):
                (self.remote / name).parent.mkdir(parents=True, exist_ok=True)
                epath.Path(self.local / name).copy(self.remote / name, overwrite=True)
            for name in self._sent.keys() - found.keys():
                (self.remote / name).unlink(missing_ok=True)
        self._sent.clear()
        self._sent.update(found)

    def _found(self) -> dict[str, tuple[int, int]]:
        files = {p: p.stat() for p in self.local.rglob("*") if p.is_file() and not p.name.endswith(".partial")}
        return {str(p.relative_to(self.local)): (s.st_size, s.st_mtime_ns) for p, s in files.items()}


@contextlib.contextmanager
def opened(place: str) -> Iterator[Workdir]:
    """A workdir by its path, or by a URL such as gs://BUCKET/FOLDER; all is sent when the context ends.

    Raises:
      UserError: nothing here reads such URLs.
      Failure: the store cannot be reached. Errors from within the context name the URL where they name the folder.
    """
    if "://" not in place:
        yield Workdir(Path(place))
        return
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises
    with tempfile.TemporaryDirectory(prefix="jaxrlhf-") as folder:
        found = Workdir(Path(folder), epath.Path(place.removeprefix("file://")))
        found.fetch()
        try:
            yield found
        except (UserError, Failure, Stopped) as error:
            raise type(error)(found.named(error)) from None
        finally:
            found.send()


def files(folder: epath.Path, but: str = "") -> Iterator[epath.Path]:
    """The files of a folder and of those in it, but for folders of one name."""
    for path in folder.iterdir():  # walk() loses the scheme of a URL
        if not path.is_dir():
            yield path
        elif path.name != but:
            yield from files(path, but)


@contextlib.contextmanager
def _told(place: epath.Path) -> Iterator[None]:
    """What a store's own library says, as one line."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"--workdir={place}: {_line(error)}; gs:// takes `pip install 'jaxrlhf[gs]'`") from None
    except Exception as error:  # of the store's library, that of its credentials, or that of its connections
        raise Failure(f"{place}: cannot be read or written ({_line(error)}); the same command goes on") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
