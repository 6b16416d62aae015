"""The mesh, and one table that says how each parameter lies on it. GSPMD does the rest."""

from __future__ import annotations

import math
import re
from typing import TypeVar

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError

Tree = TypeVar("Tree")

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


def make_mesh(c: Mesh) -> DeviceMesh:
    """A mesh with axes data, fsdp and tensor over all devices; `UserError` if it does not fit them."""
    sizes = [c.data, c.fsdp, c.tensor]
    devices = jax.device_count()
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh: axes are positive, one at most -1 (the rest); got {c}")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(devices // math.prod(s for s in sizes if s != -1), 1)
    if math.prod(sizes) != devices:
        raise UserError(f"config.mesh: data x fsdp x tensor = {math.prod(sizes)}, but there are {devices} devices")
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


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


def place(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Puts a tree of parameters or optimizer state on the mesh, by `RULES`."""

    def put(path: tuple, leaf: jax.Array) -> jax.Array:
        name = re.sub(r"/+", "/", jax.tree_util.keystr(path, simple=True, separator="/"))
        return jax.device_put(leaf, NamedSharding(mesh, spec(name, leaf.shape, mesh)))

    return jax.tree_util.tree_map_with_path(put, tree)


def shard_batch(tree: Tree, mesh: DeviceMesh) -> Tree:
    """Puts a batch on the mesh, its leading axis divided over data x fsdp."""
    return jax.device_put(tree, NamedSharding(mesh, P(("data", "fsdp"))))


def check_divides(key: str, size: int, mesh: DeviceMesh) -> None:
    """`UserError` if a batch size does not divide over the mesh, naming the key and sizes that would."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        lower = size // ways * ways
        near = f"{lower} or {lower + ways}" if lower else f"{ways}"
        raise UserError(f"{key}={size} does not divide over data x fsdp = {ways} devices; {near} would")
