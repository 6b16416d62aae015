"""Parameters in safetensors: our stacked tree, and (below) Hugging Face directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrlhf.files import UserError
from jaxrlhf.types import Params


def save_params(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a tree of arrays as one flat file, names joined by "/"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {k: np.ascontiguousarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    save_file(flat, path, dict(metadata))


def load_params(path: Path) -> tuple[Params, dict[str, str]]:
    """Reads what `save_params` wrote, and its metadata."""
    try:
        with safe_open(path, "np") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    params = traverse_util.unflatten_dict(flat, sep="/")
    for name in ("embed", "blocks", "final_norm", "lm_head"):
        params.setdefault(name, {})
    return params, metadata
