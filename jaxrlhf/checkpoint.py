"""Checkpoints by Orbax: what a stage trained, apart from what only its resumption needs, and what they belong to.

A step's folder is sealed by the SHA-256 of each of its files, written last; without a seal that fits it is no
checkpoint.
Orbax alone takes an empty folder for the newest step, and restores flipped bytes without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrlhf.claim import changes
from jaxrlhf.files import Failure, UserError, write_text
from jaxrlhf.logs import say
from jaxrlhf.types import TrainState

SEAL = "SHA256SUMS"  # `sha256sum -c STEP/SHA256SUMS` in the folder of checkpoints reads it


@contextlib.contextmanager
def saver(directory: Path, keep: int, meta: Mapping[str, Any]) -> Iterator[Callable[[TrainState], None]]:
    """A function that saves a state as step `state.step`, in the background; all is saved when the context ends.

    The newest `keep` sealed steps stay: an older one goes only when the newest is sealed.
    """
    pending: list[Future] = []
    # Orbax fails in a background thread on a relative path.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager, ThreadPoolExecutor(1) as worker:

        def settle() -> None:
            while pending:
                pending.pop().result()

        def save(state: TrainState) -> None:
            settle()
            step = int(state.step)
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),  # pyright: ignore[reportCallIssue]
                rest=ocp.args.StandardSave(_rest(state)),  # pyright: ignore[reportCallIssue]
                meta=ocp.args.JsonSave(dict(meta)),  # pyright: ignore[reportCallIssue]
            )
            manager.save(step, args=items)
            pending.append(worker.submit(_seal, manager, step, keep))

        yield save
        settle()
        _prune(directory, keep)  # what an earlier process was killed in the middle of removing


def restore(directory: Path, like: TrainState, meta: Mapping[str, Any]) -> TrainState | None:
    """The newest undamaged state, laid out as `like` on any mesh, or None; damaged steps after it are removed.

    Raises:
      UserError: it belongs to another config, trunk or tokenizer; says what differs.
    """
    for step in _steps(directory):
        if wrong := damage(directory, step):
            say(f"{directory / str(step)}: {wrong}; removed, to go on from the checkpoint before it")
            shutil.rmtree(directory / str(step))
            continue
        items = _read(directory, step, meta, {"params": like.params, "rest": _rest(like)})
        return like.replace(params=items["params"], **items["rest"])  # pyright: ignore[reportAttributeAccessIssue]
    return None


def load_params(directory: Path, step: int, like: Any, meta: Mapping[str, Any]) -> Any:
    """What a finished stage trained, laid out as `like`: that of its last step, and of no other.

    Raises:
      Failure: it is not there or damaged; says how to make it again.
      UserError: it belongs to another config, trunk or tokenizer.
    """
    if wrong := damage(directory, step):
        stage = directory.parent.name
        raise Failure(
            f"{directory / str(step)}: {wrong}; `jaxrlhf {stage}` with this config and workdir makes it again"
        )
    return _read(directory, step, meta, {"params": like})["params"]


def damage(directory: Path, step: int) -> str:
    """What is wrong with a step's files; "" where they are, byte for byte, those that were sealed."""
    folder = directory / str(step)
    if not (folder / SEAL).is_file():
        return "not saved to the end" if folder.is_dir() else "no such checkpoint"
    try:
        sealed, found = (folder / SEAL).read_bytes().decode(errors="replace"), _sums(folder)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if sealed == found:
        return ""
    odd = sorted({line[66:] for line in set(sealed.splitlines()) ^ set(found.splitlines())})
    return f"damaged ({odd[0] if odd and odd[0] in found else SEAL} is not as it was saved)"


def _seal(manager: ocp.CheckpointManager, step: int, keep: int) -> None:
    manager.wait_until_finished()
    folder = Path(manager.directory) / str(step)
    if jax.process_index() == 0:
        write_text(folder / SEAL, _sums(folder))
    _prune(folder.parent, keep)


def _prune(directory: Path, keep: int) -> None:
    if jax.process_index() == 0:
        for old in _steps(directory)[keep:]:
            shutil.rmtree(directory / str(old))


def _sums(folder: Path) -> str:
    """A line for each file but the seal, as `sha256sum` writes it; paths begin with the step, which is thus sealed."""
    paths = sorted(p for p in folder.rglob("*") if p.name != SEAL and not p.is_dir())
    lines = []
    for path in paths:
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder.parent)}\n")
    return "".join(lines)


def _steps(directory: Path) -> list[int]:
    """Steps that have a folder, newest first."""
    return sorted((int(p.name) for p in directory.glob("*") if p.is_dir() and p.name.isdecimal()), reverse=True)


def _read(directory: Path, step: int, meta: Mapping[str, Any], items: Mapping[str, Any]) -> Any:
    options = ocp.CheckpointManagerOptions(create=False)  # read_only=True would put three warnings on the terminal
    # Without a limit all leaves are on their way at once, each held twice. It must exceed the largest one.
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(items))
    handlers: dict[str, Any] = {"meta": ocp.JsonCheckpointHandler()}
    for name in items:
        handlers[name] = ocp.StandardCheckpointHandler(restore_concurrent_gb=(largest + 1_000_000) / 1e9)  # pyright: ignore[reportArgumentType]
    with ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers) as manager:
        found = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check_meta(directory, found, meta)
        targets = {k: ocp.args.StandardRestore(abstract(v)) for k, v in items.items()}  # pyright: ignore[reportCallIssue]
        return manager.restore(step, args=ocp.args.Composite(**targets))


def check_meta(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """`UserError` that says what differs, if a checkpoint was made for another config, trunk or tokenizer."""
    for change in changes(dict(found), dict(wanted), "meta"):
        raise UserError(
            f"{directory}: a checkpoint of another experiment ({change.removeprefix('meta.')}); "
            "take another --workdir or run the stages anew"
        )


def _rest(state: TrainState) -> dict[str, Any]:
    kept = {k: v for k, v in vars(state).items() if k != "params"}
    return {k: v for k, v in kept.items() if v is not None}


def abstract(tree: Any) -> Any:
    """Shapes, types and places of a tree's arrays, into which a checkpoint can be read."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
