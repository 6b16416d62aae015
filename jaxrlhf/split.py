"""The split into FROZEN and TOP: the only place that knows how many blocks are frozen.

Sharing lives in the tree: gradients and Adam see only TOP, and FROZEN is one value passed to four roles, so nothing is
masked and nothing can drift. Embeddings and output head are frozen with the blocks, else the roles' hidden states
would differ.
"""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.types import Frozen, Params, Top


def split(params: Params, freeze_layers: float) -> tuple[Frozen, Top]:
    """FROZEN and TOP. `freeze_layers` is the share of bottom blocks frozen, rounded down (Kirk et al.); 0 = nothing."""
    return take_apart(params | {"blocks": dict(params["blocks"])}, freeze_layers)


def take_apart(params: Params, freeze_layers: float) -> tuple[Frozen, Top]:
    """The same, `params["blocks"]` being emptied on the way, so that only one module of them is ever held twice."""
    blocks, lower, upper = params["blocks"], {}, {}
    k = int(freeze_layers * jax.tree.leaves(blocks)[0].shape[0])
    for module in list(blocks):
        stacks = blocks.pop(module)
        lower[module], upper[module] = (jax.tree.map(lambda x, s=s: x[s], stacks) for s in (slice(k), slice(k, None)))
        del stacks
        jax.block_until_ready((lower[module], upper[module]))
    if freeze_layers == 0:
        return Frozen(embed={}, blocks=lower, lm_head={}), Top(
            embed=params["embed"], blocks=upper, final_norm=params["final_norm"], lm_head=params["lm_head"]
        )
    return Frozen(embed=params["embed"], blocks=lower, lm_head=params["lm_head"]), Top(
        embed={}, blocks=upper, final_norm=params["final_norm"], lm_head={}
    )


def join(frozen: Frozen, top: Top) -> Params:
    """The whole parameters again: the inverse of `split`."""
    whole = pieces(frozen, top)
    return whole | {"blocks": jax.tree.map(jnp.concatenate, whole["blocks"], is_leaf=lambda x: isinstance(x, tuple))}


def pieces(frozen: Frozen, top: Top) -> Params:
    """The same without a copy: each leaf of the blocks is a pair, its lower layers and its upper ones."""
    return {
        "embed": frozen.embed or top.embed,
        "blocks": jax.tree.map(lambda a, b: (a, b), frozen.blocks, top.blocks),
        "final_norm": top.final_norm,
        "lm_head": frozen.lm_head or top.lm_head,
    }


def tree_hash(tree: Frozen | Params) -> str:
    """SHA-256 over names, shapes, types and bytes of a tree: equal trees, equal hashes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
