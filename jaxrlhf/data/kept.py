"""Prepared data that follows from a config alone, kept beside the programs that JAX keeps, for later workdirs.

Every workdir has a copy of its own, so that nothing hangs on what is kept; what is not as it was written is not taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import jax

MOST = 16  # that are kept, the latest used
SUM = "SHA256"


def place(mark: str, makers: Iterable[ModuleType]) -> Path | None:
    """Where data with this mark is kept that these modules, as they stand, make; None where JAX keeps nothing."""
    root = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if not (root and enabled) or "://" in root:
        return None
    sources = [Path(str(module.__file__)).read_bytes() for module in makers]
    return Path(root) / "data" / hashlib.sha256(b"\0".join([mark.encode(), *sources])).hexdigest()


def take(kept: Path, folder: Path) -> bool:
    """Whether `folder` is now what is kept there, byte for byte; if not, it is not there."""
    with contextlib.suppress(OSError):
        shutil.copytree(kept / "data", folder)
        if _sum(folder) == (kept / SUM).read_text():
            with contextlib.suppress(OSError):  # others may only read there
                kept.touch()
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def keep(folder: Path, kept: Path) -> None:
    """Keeps a copy of `folder`, whole or not at all, wherever that can be written; the oldest ones go."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as partial:
            whole = Path(partial) / kept.name
            shutil.copytree(folder, whole / "data")
            (whole / SUM).write_text(_sum(whole / "data"))
            shutil.rmtree(kept, ignore_errors=True)
            whole.rename(kept)
        for old in sorted(kept.parent.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[MOST:]:
            shutil.rmtree(old, ignore_errors=True)


def _sum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
