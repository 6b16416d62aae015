"""Checkpoints by Orbax: what a stage trained, apart from what only its resumption needs, and what they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrlhf.files import UserError
from jaxrlhf.types import TrainState


def open_manager(directory: Path, keep: int = 2, handlers: Mapping[str, Any] | None = None) -> ocp.CheckpointManager:
    """The manager of a stage's checkpoints; saves in the background, keeps the newest `keep`."""
    # Orbax fails in a background thread on a relative path.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, state: TrainState, meta: Mapping[str, str]) -> None:
    """Saves the state as step `state.step`: item `params`, item `rest`, and `meta`, which restoring compares."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),  # pyright: ignore[reportCallIssue]
        rest=ocp.args.StandardSave(_rest(state)),  # pyright: ignore[reportCallIssue]
        meta=ocp.args.JsonSave(dict(meta)),  # pyright: ignore[reportCallIssue]
    )
    manager.save(int(state.step), args=items)


def restore(manager: ocp.CheckpointManager, like: TrainState, meta: Mapping[str, str]) -> TrainState | None:
    """The newest state, laid out as `like`, or None if there is none; `UserError` if it belongs elsewhere."""
    step = manager.latest_step()
    if step is None:
        return None
    check_meta(Path(manager.directory), manager.restore(step, args=ocp.args.Composite(meta=_JSON))["meta"], meta)
    items = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract(like.params)),  # pyright: ignore[reportCallIssue]
            rest=ocp.args.StandardRestore(abstract(_rest(like))),  # pyright: ignore[reportCallIssue]
        ),
    )
    rest = items["rest"]
    return like.replace(  # pyright: ignore[reportAttributeAccessIssue]
        params=items["params"], step=rest["step"], opt_state=rest["opt_state"], kl_coef=rest.get("kl_coef")
    )


def load_params(directory: Path, like: Any, meta: Mapping[str, str]) -> Any:
    """What the stage trained, at its newest checkpoint, laid out as `like`."""
    # Without a limit all leaves are on their way at once, each held twice. It must exceed the largest one.
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    params = ocp.StandardCheckpointHandler(restore_concurrent_gb=(largest + 1_000_000) / 1e9)  # pyright: ignore[reportArgumentType]
    with open_manager(directory, handlers={"params": params, "meta": ocp.JsonCheckpointHandler()}) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{directory}: no checkpoint; run the stage {directory.parent.name!r} first")
        check_meta(directory, manager.restore(step, args=ocp.args.Composite(meta=_JSON))["meta"], meta)
        target = ocp.args.StandardRestore(abstract(like))  # pyright: ignore[reportCallIssue]
        return manager.restore(step, args=ocp.args.Composite(params=target))["params"]


def check_meta(directory: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """`UserError` that says what differs, if a checkpoint was made on another trunk or for another experiment."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{directory}: its {key} is {str(found.get(key))[:16]}, this experiment's is {value[:16]}; "
                "the stages must share one trunk: take another --workdir or run the stages anew"
            )


_JSON = ocp.args.JsonRestore()


def _rest(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state}
    return rest if state.kl_coef is None else rest | {"kl_coef": state.kl_coef}


def abstract(tree: Any) -> Any:
    """Shapes, types and places of a tree's arrays, without their values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
