"""The mesh, and one table that says how each parameter lies on it. GSPMD does the rest."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from jaxrlhf import hosts
from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError

if TYPE_CHECKING:
    from jaxrlhf.data.batches import Batches

Tree = TypeVar("Tree")
Given = TypeVar("Given")
Found = TypeVar("Found")

# First match wins; a leaf that matches nothing is an error. Blocks carry a leading layer axis.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/(tokens|positions)$", P("tensor", "fsdp")),
    (r"embed/project_(in|out)$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("tensor", "fsdp")),
    (r"blocks/(q|k|v)/kernel$", P(None, "fsdp", "tensor", None)),
    (r"blocks/o/kernel$", P(None, "tensor", None, "fsdp")),
    (r"blocks/(up|gate)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/down/kernel$", P(None, "tensor", "fsdp")),
    (r"(scale|bias|w_D|b)$", P()),
    (r"(^|/)(count|step|skipped|in_a_row|kl_coef)$", P()),
)


def make_mesh(c: Mesh, of: Sequence[Any] = ()) -> DeviceMesh:
    """A mesh with axes data, fsdp and tensor over the devices, by default all; `UserError` if it does not fit them."""
    sizes, found = [c.data, c.fsdp, c.tensor], of or hosts.devices()
    devices = len(found)
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh: axes are positive, one at most -1 (the rest); got {c}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(devices // math.prod(s for s in sizes if s != -1), 1)
    if math.prod(sizes) != devices:
        raise UserError(f"config.mesh: data x fsdp x tensor = {math.prod(sizes)}, but there are {devices} devices")
    names, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes), names, axis_types=kinds, devices=found)


def spec(path: str, shape: tuple[int, ...], mesh: DeviceMesh) -> P:
    """The partition of one parameter; a dimension that an axis does not divide stays whole.

    Leading axes beyond a rule's, such as an ensemble's members, stay whole too.
    """
    for pattern, rule in RULES:
        if re.search(pattern, path):
            lead = len(shape) - len(rule) if rule else 0
            axes = [a if a and shape[lead + i] % mesh.shape[a] == 0 else None for i, a in enumerate(rule)]
            return P(*[None] * lead, *axes)
    raise ValueError(f"no sharding rule for parameter {path!r}")


def layout(tree: Any, mesh: DeviceMesh) -> Any:
    """How each leaf of a tree of parameters or optimizer state lies on the mesh, by `RULES`."""

    def lies(path: tuple, leaf: jax.Array) -> NamedSharding:
        name = re.sub(r"/+", "/", jax.tree_util.keystr(path, simple=True, separator="/"))
        return NamedSharding(mesh, spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(lies, tree)


def place(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Puts a tree of parameters or optimizer state on the mesh, by `RULES`."""
    return jax.tree.map(jax.device_put, tree, layout(tree, mesh))


def rows(mesh: DeviceMesh) -> NamedSharding:
    """The leading axis divided over data x fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def ways(mesh: DeviceMesh) -> int:
    """Over how many devices rows are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Puts a batch that every process has whole on the mesh, its leading axis divided over data x fsdp."""
    where = rows(mesh)
    if where.is_fully_addressable:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__), tree)


def shard_step(stream: Batches[Tree], step: int, mesh: DeviceMesh) -> Tree:
    """A step's batch on the mesh, likewise divided: each process makes only the rows that its devices hold."""
    where, (count, make) = rows(mesh), stream.parts(step)
    held = where.addressable_devices_indices_map((count,)).values()
    own = sorted({r for index in held if index for r in range(*index[0].indices(count))})

    def put(x: np.ndarray) -> jax.Array:
        def some(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(count)
            return x[bisect_left(own, start) : bisect_left(own, stop)]

        return jax.make_array_from_callback((count, *x.shape[1:]), where, some)

    return jax.tree.map(put, make(own))


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array, on every host."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def ahead(launch: Callable[[Given], Found], each: Iterable[Given]) -> Iterator[Found]:
    """What `launch` gives for each, in order, the next one launched before: the device works while the host reads.

    Hosts that launch and read alike have their collectives in one order; what several hosts read by a collective comes
    after what was launched.
    """
    before: list[Found] = []
    for given in each:
        now = launch(given)
        yield from before
        before = [now]
    yield from before


def check_divides(key: str, size: int, mesh: DeviceMesh, parts: int = 1) -> None:
    """`UserError` if a batch, or each of its `parts`, does not divide over the mesh; names key and sizes that would."""
    devices = ways(mesh)
    step = devices * parts
    if size % step:
        lower = size // step * step
        near = f"{lower} or {lower + step}" if lower else f"{step}"
        times = f" x optim.accumulate = {parts}" if parts > 1 else ""
        raise UserError(f"{key}={size} does not divide over data x fsdp = {devices} devices{times}; {near} would")
