"""Parameters in safetensors: our stacked tree in one flat file, and Hugging Face directories in and out.

Layouts follow from the leaf: our kernels are [inputs..., outputs...] with heads apart; theirs are matrices, [outputs,
inputs] where they use Linear and [inputs, outputs] where they use Conv1D (GPT-2). Queries, keys and values fused into
one tensor lie there one after the other (GPT-2) or head by head (GPT-NeoX).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import families, model, sharding, shards
from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError, listed, read_json, write_json
from jaxrlhf.types import Params, ScalarHead

SCORE = "score.weight"
Read = Callable[[str], np.ndarray]
# What older checkpoints store beside their weights, all of it following from the config.
BUFFERS = re.compile(
    r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)


def save_params(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a tree of arrays as one flat file, names joined by "/", whole or not at all; types stay as they are."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shards.write(path, {name: shards.held(np.asarray(leaf)) for name, leaf in flat.items()}, metadata)


def load_params(path: Path) -> tuple[Params, dict[str, str]]:
    """Reads what `save_params` wrote of whole parameters, and its metadata; `UserError` if the file is not whole."""
    with shards.opened(path) as file:
        names, metadata = list(file.keys()), dict(file.metadata() or {})
    params = traverse_util.unflatten_dict({name: shards.read(path, name) for name in names}, sep="/")
    for name in ("embed", "blocks", "final_norm", "lm_head"):
        params.setdefault(name, {})
    return params, metadata


def architecture(directory: Path) -> model.Architecture:
    """The decoder that a Hugging Face directory's config.json describes.

    Raises:
      UserError: it is missing or no JSON, has an option that the decoder lacks, or the directory holds an adapter.
    """
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        raise UserError(
            f"{adapter}: an adapter (LoRA), not a whole model; merge it into its base with peft's merge_and_unload(), "
            "save_pretrained that, and take the directory that it writes"
        )
    config = read_json(directory / "config.json")
    try:
        return families.architecture(config)
    except UserError as error:
        raise UserError(f"{directory}/{error}") from None


def load(directory: Path, mesh: DeviceMesh | None = None, dtype: Any = None) -> tuple[model.Architecture, Params]:
    """Reads a Hugging Face directory: config.json and model.safetensors, or its shards and their index.

    Tensors are read one at a time straight to their place on the mesh, so that beside the result the host never holds
    more than one of them.

    Args:
      directory: with config.json.
      mesh: where parameters go, by `sharding.RULES`; all devices, each with a copy, where none is given.
      dtype: what they become; as stored where none is given.

    Returns the architecture and the parameters as `model.init` lays them out.

    Raises:
      UserError: a file is missing or broken, the config has an option that the decoder lacks, or a tensor is missing,
        unexpected or of the wrong shape; all are named.
    """
    arch, flat, _ = _load(directory, mesh, dtype, False)
    return arch, {"final_norm": {}, "lm_head": {}} | traverse_util.unflatten_dict(flat, sep="/")


def load_reward(
    directory: Path, mesh: DeviceMesh | None = None, dtype: Any = None
) -> tuple[model.Architecture, Params, ScalarHead]:
    """Reads a reward model that AutoModelForSequenceClassification loads, with one label: `export_reward`'s inverse.

    Returns its parameters without an output head, and its read-out, to which the config's `jaxrlhf_score_bias` belongs.
    For the rest see `load`.
    """
    config = read_json(directory / "config.json")
    arch, flat, score_1D = _load(directory, mesh, dtype, True)
    w_D = score_1D[0].astype(np.float32)
    if arch.embed_width:
        w_D = np.asarray(flat["embed/project_out"], np.float32) @ w_D
    params = {"final_norm": {}, "lm_head": {}} | traverse_util.unflatten_dict(flat, sep="/")
    head = ScalarHead(w_D=jnp.asarray(w_D), b=jnp.float32(config.get("jaxrlhf_score_bias", 0.0)))
    return arch, params, head


def _load(
    directory: Path, mesh: DeviceMesh | None, dtype: Any, reward: bool
) -> tuple[model.Architecture, dict[str, Any], np.ndarray]:
    arch = architecture(directory)
    stored = shards.stored(directory)
    stack_of, kinds = partial(re.sub, r"\.\d+\.", ".{}."), dict[str, np.dtype]()

    def read(name: str) -> np.ndarray:
        array = shards.read(stored[name], name)
        if array.dtype not in shards.KINDS:
            raise UserError(f"{stored[name]}: tensor {name} is {array.dtype}; expected f32, f16 or bf16")
        if dtype is None and array.dtype != kinds.setdefault(stack_of(name), array.dtype):
            raise UserError(f"{stored[name]}: tensor {name} is {array.dtype}, unlike the same of other layers")
        return array

    shapes = {leaf: shape for leaf, shape in _shapes(arch).items() if not (reward and leaf == "lm_head/kernel")}
    prefix = next((p for p in families.PREFIXES[arch.family] if _name(arch, "embed/tokens", p) in stored), "")
    names = {leaf: _name(arch, leaf, prefix) for leaf in shapes}
    if SCORE in stored and not reward:
        raise UserError(
            f"{directory}: holds {SCORE}: a reward model, which has no output head and cannot be a base; "
            f"PPO trains against it with --config.reward.init={directory}"
        )
    score = _score(directory, arch, stored, read) if reward else np.zeros((1, 0), np.float32)
    _check_names(directory, arch, names, {k: v for k, v in stored.items() if not (reward and k == SCORE)}, read)
    mesh = mesh or sharding.make_mesh(Mesh())
    flat = {}
    for leaf, shape in shapes.items():
        place = NamedSharding(mesh, sharding.spec(leaf, shape, mesh))
        layer = partial(_layer, arch, leaf, names[leaf], shape, read, stored)
        flat[leaf] = _stack(layer, shape, place, dtype) if _stacked(leaf) else _place(layer(0), place, dtype)
    return arch, flat, score


def _score(directory: Path, arch: model.Architecture, stored: Mapping[str, Path], read: Read) -> np.ndarray:
    """The read-out [1, E] of a reward model, E the width that the output head reads."""
    if SCORE not in stored:
        raise UserError(f"{directory}: no tensor {SCORE}: not a reward model (AutoModelForSequenceClassification)")
    array, wanted = read(SCORE), (1, arch.token_width)
    if array.shape != wanted:
        raise UserError(f"{directory}: {SCORE} is {list(array.shape)}; a reward model of one label has {list(wanted)}")
    return array


def export(
    directory: Path,
    arch: model.Architecture,
    params: Params,
    special: Mapping[str, int | None],
    shard_bytes: int = shards.SHARD_BYTES,
) -> None:
    """Writes a policy as a Hugging Face directory, config.json and safetensors: the inverse of `load`.

    Beside the parameters, the host never holds more than one tensor.

    Args:
      directory: made where missing.
      arch: its options must be ones that its family's config can say.
      params: whole parameters, laid out as by `model.init`, or as by `split.pieces`.
      special: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`, which the config carries.
      shard_bytes: what a file holds at most; more than that, and there are several, with an index.
    """
    suffix = "LMHeadModel" if arch.family == "gpt2" else "ForCausalLM"
    config = families.config_of(arch) | dict(special) | {"architectures": [families.CLASSES[arch.family] + suffix]}
    _write_directory(directory, config, _tensors(arch, params), shard_bytes)


def export_reward(
    directory: Path,
    arch: model.Architecture,
    params: Params,
    head: ScalarHead,
    special: Mapping[str, int | None],
    shard_bytes: int = shards.SHARD_BYTES,
) -> None:
    """Writes a reward model as a Hugging Face directory that AutoModelForSequenceClassification loads (one label).

    Its `score` has no bias. Ours goes into the final norm's, where the family has one: score(h + w b / |w|²) is
    score(h) + b. Where it has none, transformers' scores are ours less the config's `jaxrlhf_score_bias`: comparisons
    are the same. OPT-350m's score is read after `project_out`, which then passes ours alone.

    Args:
      directory: made where missing.
      arch: as in `export`.
      params: as in `export`, of the reward model's trunk and top.
      head: its read-out.
      special: as in `export`; `pad_token_id` is what tells transformers where a text ends, so it must be given.
      shard_bytes: as in `export`.
    """
    if special.get("pad_token_id") is None:
        raise UserError(f"{directory}: a reward model needs a pad_token_id, which tells transformers where texts end")
    w_D, b = np.asarray(head.w_D, np.float32), float(head.b)
    tensors = _tensors(arch, params)
    prefix = families.PREFIXES[arch.family][0]
    tensors.pop(families.HEADS[arch.family], None)
    bias = _name(arch, "final_norm/bias", prefix)
    if bias in tensors and w_D.any():
        bias_D = tensors[bias].make()
        folded_D = np.asarray(bias_D, np.float32) + w_D * (b / float(np.square(w_D, dtype=np.float64).sum()))
        tensors[bias], b = shards.held(folded_D.astype(bias_D.dtype)), 0.0
    if arch.embed_width:
        project = _name(arch, "embed/project_out", prefix)
        first = np.zeros(tensors[project].shape, tensors[project].dtype)
        first[0] = w_D
        tensors[project] = shards.held(first)
        w_D = np.eye(1, arch.embed_width, dtype=np.float32)[0]
    config = families.config_of(arch) | dict(special) | {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    config |= {"architectures": [families.CLASSES[arch.family] + "ForSequenceClassification"]}
    tensors[SCORE] = shards.held(w_D[None])
    _write_directory(directory, config | {"jaxrlhf_score_bias": b}, tensors, shard_bytes)


def _write_directory(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, shards.Tensor], shard_bytes: int
) -> None:
    kind = next(iter(tensors.values())).dtype
    name = "bfloat16" if kind == ml_dtypes.bfloat16 else str(kind)
    shards.write_model(directory, tensors, shard_bytes)
    write_json(directory / "config.json", {**config, "dtype": name})


def _name(arch: model.Architecture, leaf: str, prefix: str) -> str:
    return families.tensor_name(arch.family, leaf, prefix)


def _shapes(arch: model.Architecture) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: model.init(arch, jax.random.key(0)))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    return {name: leaf.shape for name, leaf in flat.items()}


def _check_names(
    directory: Path, arch: model.Architecture, names: Mapping[str, str], stored: Mapping[str, Path], read: Read
) -> None:
    wanted = {theirs.split("#")[0].format(i) for theirs in names.values() for i in range(arch.layers)}
    if missing := wanted - stored.keys():
        raise UserError(f"{directory}: the config asks for tensors that are not stored: {listed(sorted(missing))}")
    unexpected = {name for name in stored.keys() - wanted if not BUFFERS.search(name)}
    head = families.HEADS[arch.family]
    if arch.tied and head in unexpected:
        # Some save the tied head as well; one that differs would not be used, so it is refused.
        if not np.array_equal(read(head), read(names["embed/tokens"])):
            raise UserError(f"{directory}: {head} differs from the embeddings, but config.json ties them")
        unexpected -= {head}
    if unexpected:
        raise UserError(f"{directory}: stores tensors that the config does not ask for: {listed(sorted(unexpected))}")


def _stacked(leaf: str) -> bool:
    return leaf.startswith("blocks/")


def _stack(read_layer: Callable[[int], np.ndarray], shape: tuple[int, ...], place: NamedSharding, dtype: Any) -> Any:
    """A leaf of "blocks" on the mesh, written layer by layer into its place."""
    layer_place = NamedSharding(place.mesh, P(*place.spec[1:]))
    whole = None
    for i in range(shape[0]):
        layer = _place(read_layer(i), layer_place, dtype)
        if whole is None:
            whole = jnp.zeros(shape, layer.dtype, device=place)
        # Waiting keeps the host from reading ahead, which would hold many layers at once.
        whole = jax.block_until_ready(_set_layer(whole, layer, i))
    return whole


@partial(jax.jit, donate_argnums=0)
def _set_layer(whole: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0)


def _place(array: np.ndarray, place: NamedSharding, dtype: Any) -> jax.Array:
    """On the mesh, each device given its own part and no more."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index].astype(dtype or array.dtype))


def _transposed(arch: model.Architecture, leaf: str) -> bool:
    kernel = _stacked(leaf) and leaf.endswith("/kernel")
    return (kernel and arch.family != "gpt2") or leaf.startswith("embed/project")


def _matrix(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer's leaf as they hold it, before any transposing: heads joined with their width."""
    if not _stacked(leaf):
        return shape
    if not leaf.endswith("/kernel"):
        return (math.prod(shape),)
    inputs = 2 if leaf == "blocks/o/kernel" else 1
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


def _their_shape(arch: model.Architecture, leaf: str, shape: tuple[int, ...], fused: bool) -> tuple[int, ...]:
    """The shape of their tensor of one layer's leaf."""
    flat = _matrix(leaf, shape)
    whole = (*flat[:-1], 3 * flat[-1]) if fused else flat
    return whole[::-1] if _transposed(arch, leaf) else whole


def _fused_axis(arch: model.Architecture) -> int:
    """Which axis of a fused tensor, [..., 3, H, K] or [..., H, 3, K], tells queries, keys and values apart."""
    return -3 if arch.family == "gpt2" else -2


def _layer(
    arch: model.Architecture,
    leaf: str,
    theirs: str,
    shape: tuple[int, ...],
    read: Read,
    stored: Mapping[str, Path],
    i: int,
) -> np.ndarray:
    """One layer's leaf, read and laid out as ours."""
    shape = shape[1:] if _stacked(leaf) else shape
    name, _, part = theirs.partition("#")
    name = name.format(i)
    wanted = _their_shape(arch, leaf, shape, bool(part))
    array = read(name)
    if array.shape != wanted:
        raise UserError(f"{stored[name]}: {name} is {list(array.shape)}; the config asks for {list(wanted)}")
    array = array.T if _transposed(arch, leaf) else array
    if part:
        apart = list(shape)
        apart.insert(len(shape) + 1 + _fused_axis(arch), 3)
        array = array.reshape(apart).take(int(part), axis=_fused_axis(arch))
    return array.reshape(shape)


def _tensors(arch: model.Architecture, params: Params) -> dict[str, shards.Tensor]:
    """Their tensors of our parameters, bottom to top: the inverse of `_layer` for all of them."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    shapes, rows = _shapes(arch), dict[str, list[str]]()
    prefix = families.PREFIXES[arch.family][0]
    for theirs, leaf in sorted((_name(arch, leaf, prefix), leaf) for leaf in shapes):
        rows.setdefault(theirs.split("#")[0], []).append(leaf)
    layers = [(theirs, i) for i in range(arch.layers) for theirs in rows if "{}" in theirs]
    others = [(theirs, 0) for theirs in rows if "{}" not in theirs]
    lowest = [row for row in others if rows[row[0]][0].startswith("embed/")]
    tensors = {}
    for theirs, i in (*lowest, *layers, *(row for row in others if row not in lowest)):
        leaves = rows[theirs]
        stacks = [flat[leaf] if isinstance(flat[leaf], tuple) else (flat[leaf],) for leaf in leaves]
        shape = shapes[leaves[0]][1:] if _stacked(leaves[0]) else shapes[leaves[0]]
        wanted = _their_shape(arch, leaves[0], shape, len(leaves) > 1)
        make = partial(_theirs, arch, leaves[0], stacks, i)
        tensors[theirs.format(i)] = shards.Tensor(wanted, np.dtype(stacks[0][0].dtype), make)
    return tensors


def _theirs(arch: model.Architecture, leaf: str, stacks: list[tuple[Any, ...]], i: int) -> np.ndarray:
    """Their tensor of one layer's leaf, or of the three that are fused in it."""
    parts = [np.asarray(_at(pieces, i) if _stacked(leaf) else pieces[0]) for pieces in stacks]
    flat = _matrix(leaf, parts[0].shape)
    if len(parts) > 1:
        array = np.stack(parts, _fused_axis(arch)).reshape(*flat[:-1], 3 * flat[-1])
    else:
        array = parts[0].reshape(flat)
    return array.T if _transposed(arch, leaf) else array


def _at(pieces: tuple[Any, ...], i: int) -> Any:
    """Layer `i` of a leaf whose layers lie in several arrays, one after the other."""
    for piece in pieces:
        if i < len(piece):
            return piece[i]
        i -= len(piece)
    raise IndexError(i)
