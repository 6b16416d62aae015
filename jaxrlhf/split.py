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
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    k = int(freeze_layers * layers)
    lower = jax.tree.map(lambda x: x[:k], params["blocks"])
    upper = jax.tree.map(lambda x: x[k:], params["blocks"])
    if freeze_layers == 0:
        return Frozen(embed={}, blocks=lower, lm_head={}), Top(
            embed=params["embed"], blocks=upper, final_norm=params["final_norm"], lm_head=params["lm_head"]
        )
    return Frozen(embed=params["embed"], blocks=lower, lm_head=params["lm_head"]), Top(
        embed={}, blocks=upper, final_norm=params["final_norm"], lm_head={}
    )


def join(frozen: Frozen, top: Top) -> Params:
    """The whole parameters again: the inverse of `split`."""
    return {
        "embed": frozen.embed or top.embed,
        "blocks": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), frozen.blocks, top.blocks),
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
