"""Safetensors files: which of them holds which tensor, one tensor at a time in and out."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrlhf.files import UserError, listed, read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
KINDS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


class Tensor(NamedTuple):
    """A tensor to write, made when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """What it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def held(array: np.ndarray) -> Tensor:
    """One that is made already."""
    return Tensor(array.shape, array.dtype, lambda: array)


def stored(directory: Path, opened_by: str = "transformers' AutoModelForCausalLM.from_pretrained") -> dict[str, Path]:
    """Every tensor's name in a Hugging Face directory, and the file that holds it.

    Args:
      directory: with model.safetensors, which transformers looks for first too, or shards and their index.
      opened_by: what reads a directory of pickles in PyTorch, for the advice where there is no safetensors file.

    Raises:
      UserError: a file is missing or not whole, or index and files differ; names the file and the tensor.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return dict.fromkeys(_names(directory / SINGLE), directory / SINGLE)
    if not index.exists():
        raise UserError(_no_weights(directory, opened_by))
    try:
        listing = {str(tensor): str(name) for tensor, name in read_json(index)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: expected an object with `weight_map`: tensor names to file names") from None
    if any(Path(name).name != name for name in listing.values()):
        raise UserError(f"{index}: weight_map must name files in the same directory")
    found = {}
    for name in sorted(set(listing.values())):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: no such file, though {INDEX} places {_first(listing, name)} in it")
        found |= dict.fromkeys(_names(directory / name), directory / name)
    if missing := [tensor for tensor in listing if found.get(tensor) != directory / listing[tensor]]:
        raise UserError(f"{index}: weight_map places {missing[0]} in {listing[missing[0]]}, which does not hold it")
    strays = [p.name for p in sorted(directory.glob("model-*-of-*.safetensors")) if p.name not in listing.values()]
    if strays:
        raise UserError(f"{index}: weight_map does not name {listed(strays)}, which lies beside it")
    return found


def read(path: Path, name: str) -> np.ndarray:
    """One tensor of a file; `UserError` if it cannot be read."""
    # Opened for each tensor: what is read of an open file stays mapped, and so counts as this process's memory.
    with opened(path) as file:
        try:
            return file.get_tensor(name)
        except AttributeError:  # numpy has no such type
            kind = file.get_slice(name).get_dtype()
            raise UserError(f"{path}: tensor {name} is {kind}; expected {', '.join(KINDS.values())}") from None
        except (SafetensorError, OSError, TypeError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; `UserError` if it is missing or not whole."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        file = safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    with file:
        yield file


def write_model(directory: Path, tensors: Mapping[str, Tensor], most: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or, where that were over `most` bytes, shards and their index as transformers does.

    A shard is over `most` bytes only where one tensor is.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if shards[-1] and tensor.bytes > room:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= tensor.bytes
    count, one = len(shards), len(shards) == 1
    files = [SINGLE if one else f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for file, shard in zip(files, shards, strict=True):
        write(directory / file, shard, {"format": "pt"})
    (directory / (INDEX if one else SINGLE)).unlink(missing_ok=True)  # of an earlier model, which would be read instead
    if not one:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(t.bytes for t in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes one file, whole or not at all, of the bytes that safetensors' own writer gives it.

    That one takes all tensors at once, and holds them twice; here they are made and written one after the other.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # each aligned to its own size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].bytes
        kind, shape = KINDS[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name].make()).reshape(-1).view(np.uint8).data)
    partial.replace(path)


def _names(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def _first(listing: Mapping[str, str], file: str) -> str:
    return next(tensor for tensor, name in listing.items() if name == file)


def _no_weights(directory: Path, opened_by: str) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    found = f", only {listed(pickles)}, which can run code when read, and so is not" if pickles else ""
    return (
        f"{directory}: no {SINGLE}{found}; where PyTorch is installed, {opened_by}(DIR).save_pretrained(NEW) writes one"
    )
