"""What a step computes, and the least time that a chip can take for it (Williams et al. 2009)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU chip: bytes, bytes a second and FLOPs a second."""

    flops: float  # peak, bf16
    hbm: float  # bytes that a program can use
    hbm_rate: float
    ici_rate: float  # one way, all of the chip's links together


# flops, hbm_rate and ici_rate: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e}, where ICI is given both ways,
# so half of it here; v4's ICI, 6 links of 50 GB/s: Jouppi et al. 2023, table 4. hbm: what libtpu 0.0.52 says is
# available when it refuses a program.
CHIPS = {
    "v4": Chip(flops=275e12, hbm=30.75 * GIB, hbm_rate=1.2e12, ici_rate=300e9),
    "v5e": Chip(flops=197e12, hbm=15.75 * GIB, hbm_rate=819e9, ici_rate=200e9),
    "v5p": Chip(flops=459e12, hbm=95.73 * GIB, hbm_rate=2765e9, ici_rate=600e9),
    "v6e": Chip(flops=918e12, hbm=31.24 * GIB, hbm_rate=1638e9, ici_rate=400e9),
}


def seconds(chip: Chip, flops: float, hbm: float, sent: float) -> dict[str, float]:
    """Seconds that each limit alone allows, from FLOPs and bytes a chip; a step takes at least the longest."""
    return {"compute": flops / chip.flops, "hbm": hbm / chip.hbm_rate, "ici": sent / chip.ici_rate}


def flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a traced function: two for each multiply-add, loops as often as they run.

    What is computed again for gradients counts again. A `while` counts as if it ran to the bound in its condition; one
    that counts on where another stopped, not at all, as the other counts as if it had not stopped. A kernel counts as
    if it left out none of its blocks.

    Raises:
      ValueError: a `while` whose condition compares with no constant.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    total, counted = 0.0, []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif eqn.primitive.name == "scan":
            total += eqn.params["length"] * flops(eqn.params["jaxpr"])
        elif eqn.primitive.name == "while":
            if body := flops(eqn.params["body_jaxpr"]):
                bound, counter, counter_end = _bound(eqn)
                total += 0 if any(counter is x for x in counted) else bound * body
                counted.append(counter_end)
        elif eqn.primitive.name == "shard_map":  # one device's share
            total += eqn.params["mesh"].size * flops(eqn.params["jaxpr"])
        elif eqn.primitive.name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * flops(eqn.params["jaxpr"])
        elif eqn.primitive.name == "cond":
            total += max(flops(b) for b in eqn.params["branches"])
        else:
            total += sum(flops(inner) for inner in _inner(eqn.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
                yield x


def _bound(eqn: core.JaxprEqn) -> tuple[int, Any, Any]:
    """How often a loop runs by the constant that its counter is compared with; the counter before, and after."""
    condition, constants = eqn.params["cond_jaxpr"].jaxpr, eqn.params["cond_nconsts"]
    starts = eqn.invars[len(eqn.invars) - len(eqn.outvars) :]
    for e in condition.eqns:
        if e.primitive.name == "lt" and e.invars[0] in condition.invars and isinstance(e.invars[1], core.Literal):
            at = condition.invars.index(e.invars[0]) - constants
            start = int(starts[at].val) if isinstance(starts[at], core.Literal) else 0
            return int(e.invars[1].val) - start, starts[at], eqn.outvars[at]
    raise ValueError("a while loop whose condition compares with no constant has no bound that can be read")


def held(tree: Any) -> float:
    """Bytes a chip that a tree of sharded shapes takes."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
