"""Parameters in safetensors: our stacked tree in one flat file, and Hugging Face directories in and out.

A row of `NAMES` pairs one of our leaves with one of their tensors. Layouts follow from the leaf: our kernels are
[inputs..., outputs...] with heads apart; theirs are matrices, [outputs, inputs] where they use Linear (OPT, LLaMA)
and [inputs, outputs] where they use Conv1D (GPT-2), whose `#i` rows are thirds of a fused matrix.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrlhf import model
from jaxrlhf.files import UserError, read_json, write_json
from jaxrlhf.types import Params


def _rows(norms: Mapping[str, str], linears: Mapping[str, str], biases: bool) -> dict[str, str]:
    rows = {}
    for weight, table in (("scale", norms), ("kernel", linears)):
        for ours, theirs in table.items():
            name, part = (*theirs.split("#"), "")[:2]
            for leaf, suffix in ((weight, "weight"), ("bias", "bias")) if biases else ((weight, "weight"),):
                rows[f"{ours}/{leaf}"] = f"{name}.{suffix}" + (f"#{part}" if part else "")
    return rows


# Ours: theirs, without the prefix that a model with an output head adds to its base model's names.
NAMES: dict[str, dict[str, str]] = {
    "llama": {"embed/tokens": "embed_tokens.weight"}
    | _rows(
        norms={
            "blocks/attn_norm": "layers.{}.input_layernorm",
            "blocks/mlp_norm": "layers.{}.post_attention_layernorm",
            "final_norm": "norm",
        },
        linears={
            "blocks/q": "layers.{}.self_attn.q_proj",
            "blocks/k": "layers.{}.self_attn.k_proj",
            "blocks/v": "layers.{}.self_attn.v_proj",
            "blocks/o": "layers.{}.self_attn.o_proj",
            "blocks/gate": "layers.{}.mlp.gate_proj",
            "blocks/up": "layers.{}.mlp.up_proj",
            "blocks/down": "layers.{}.mlp.down_proj",
        },
        biases=False,
    ),
    "opt": {"embed/tokens": "embed_tokens.weight", "embed/positions": "embed_positions.weight"}
    | _rows(
        norms={
            "blocks/attn_norm": "layers.{}.self_attn_layer_norm",
            "blocks/mlp_norm": "layers.{}.final_layer_norm",
            "final_norm": "final_layer_norm",
        },
        linears={
            "blocks/q": "layers.{}.self_attn.q_proj",
            "blocks/k": "layers.{}.self_attn.k_proj",
            "blocks/v": "layers.{}.self_attn.v_proj",
            "blocks/o": "layers.{}.self_attn.out_proj",
            "blocks/up": "layers.{}.fc1",
            "blocks/down": "layers.{}.fc2",
        },
        biases=True,
    ),
    "gpt2": {"embed/tokens": "wte.weight", "embed/positions": "wpe.weight"}
    | _rows(
        norms={"blocks/attn_norm": "h.{}.ln_1", "blocks/mlp_norm": "h.{}.ln_2", "final_norm": "ln_f"},
        linears={
            "blocks/q": "h.{}.attn.c_attn#0",
            "blocks/k": "h.{}.attn.c_attn#1",
            "blocks/v": "h.{}.attn.c_attn#2",
            "blocks/o": "h.{}.attn.c_proj",
            "blocks/up": "h.{}.mlp.c_fc",
            "blocks/down": "h.{}.mlp.c_proj",
        },
        biases=True,
    ),
}
HEAD = "lm_head.weight"
PREFIXES = {"llama": ("model.", ""), "opt": ("model.decoder.", "decoder.", ""), "gpt2": ("transformer.", "")}
# What older checkpoints store beside their weights, all of it following from the config.
BUFFERS = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")

# Fields of `model.Architecture`: their names in config.json.
_COMMON = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
FIELDS: dict[str, dict[str, str]] = {
    "llama": _COMMON
    | {
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "ff_width": "intermediate_size",
        "norm_eps": "rms_norm_eps",
    },
    "opt": _COMMON | {"ff_width": "ffn_dim"},
    "gpt2": _COMMON
    | {
        "layers": "n_layer",
        "width": "n_embd",
        "heads": "n_head",
        "ff_width": "n_inner",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
    },
}
# Options of which the decoder implements only these values.
IMPLEMENTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    "opt": {
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "enable_bias": (True,),
        "layer_norm_elementwise_affine": (True,),
        "activation_function": ("relu",),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}


def save_params(path: Path, params: Params, metadata: Mapping[str, str]) -> None:
    """Writes a tree of arrays as one flat file, names joined by "/", whole or not at all; types stay as they are."""
    _write(path, traverse_util.flatten_dict(params, sep="/"), metadata)


def load_params(path: Path) -> tuple[Params, dict[str, str]]:
    """Reads what `save_params` wrote of whole parameters, and its metadata; `UserError` if the file is not whole."""
    with contextlib.ExitStack() as stack:
        file = _open(path, stack)
        flat = {name: _tensor(path, file, name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    params = traverse_util.unflatten_dict(flat, sep="/")
    for name in ("embed", "blocks", "final_norm", "lm_head"):
        params.setdefault(name, {})
    return params, metadata


def load(directory: Path) -> tuple[model.Architecture, Params]:
    """Reads a Hugging Face directory: config.json and model.safetensors, or its shards and their index.

    Returns the architecture and numpy parameters as `model.init` lays them out, in the types they are stored in.

    Raises:
      UserError: a file is missing or broken, the config has an option that the decoder lacks, or a tensor is missing,
        unexpected or of the wrong shape; all are named.
    """
    config = read_json(directory / "config.json")
    arch = architecture(config)
    family = config["model_type"]
    with contextlib.ExitStack() as stack:
        stored: dict[str, tuple[Path, Any]] = {}
        for path in _weight_files(directory):
            file = _open(path, stack)
            stored |= dict.fromkeys(file.keys(), (path, file))

        def read(name: str) -> np.ndarray:
            path, file = stored[name]
            array = _tensor(path, file, name)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{path}: tensor {name} is {array.dtype}; expected f32, f16 or bf16")
            return array

        prefix = next((p for p in PREFIXES[family] if p + NAMES[family]["embed/tokens"] in stored), PREFIXES[family][0])
        names = _names(family, arch, prefix)
        _check_names(directory, arch, names, set(stored), read)
        shapes = _shapes(arch)
        flat = {ours: _import(family, ours, names[ours], shapes[ours], read, directory) for ours in names}
    return arch, {"lm_head": {}} | traverse_util.unflatten_dict(flat, sep="/")


def export(directory: Path, arch: model.Architecture, params: Params, special: Mapping[str, int | None]) -> None:
    """Writes a Hugging Face directory, config.json and model.safetensors: the inverse of `load`.

    Args:
      directory: made where missing.
      arch: its options must be one of the families'.
      params: whole parameters, laid out as by `model.init`.
      special: the tokenizer's `bos_token_id`, `eos_token_id` and `pad_token_id`, which the config carries.
    """
    family = next(f for f in FIELDS if model.FAMILIES[f]["activation"] == arch.activation)
    config: dict[str, Any] = {"model_type": family}
    config |= {theirs: getattr(arch, ours) for ours, theirs in FIELDS[family].items()} | dict(special)
    if family == "llama":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": arch.rope_theta}
    if family == "opt":
        config["word_embed_proj_dim"] = arch.width
    if architecture(config) != arch:
        raise UserError(f"{directory}: Hugging Face's {family} has no such architecture; nothing was written")
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors: dict[str, Any] = {}
    for ours, theirs in _names(family, arch, PREFIXES[family][0]).items():
        tensors |= _export(family, ours, theirs, np.asarray(flat[ours]), tensors)
    _write(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", config)


def architecture(config: Mapping[str, Any]) -> model.Architecture:
    """The decoder that a Hugging Face config describes, transformers' defaults filled in.

    Raises:
      UserError: names the first option that the decoder does not implement, and what it implements.
    """
    from transformers import AutoConfig  # seconds to import, and needed here only

    if not isinstance(config, Mapping) or "model_type" not in config or config["model_type"] not in FIELDS:
        raise UserError(f"config.json: expected an object whose model_type is one of {', '.join(FIELDS)}")
    family = config["model_type"]
    if "quantization_config" in config:
        raise UserError("config.json: quantization_config: quantised weights are not read; use the unquantised model")
    try:
        full = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"}).to_dict()
    except Exception as error:  # whatever transformers raises on a bad value, the value is the user's
        raise UserError(f"config.json: {' '.join(str(error).split())}") from None
    for key, values in IMPLEMENTED[family].items():
        if full[key] not in values:
            raise UserError(f"config.json: {key}={full[key]!r} is not implemented; known: {_listed(values)}")
    fields = {ours: full[theirs] for ours, theirs in FIELDS[family].items()}
    if family == "llama":
        fields["rope_theta"] = _rope_theta(full["rope_parameters"])
    if family == "opt" and full["word_embed_proj_dim"] != full["hidden_size"]:
        raise UserError("config.json: word_embed_proj_dim other than hidden_size is not implemented")
    if family == "gpt2" and fields["ff_width"] is None:
        fields["ff_width"] = 4 * fields["width"]
    fields = {"kv_heads": fields["heads"], "head_width": fields["width"] // max(fields["heads"], 1)} | fields
    _check_sizes(family, fields)
    return model.Architecture(**(model.FAMILIES[family] | fields))


def _rope_theta(rope: Mapping[str, Any]) -> float:
    known = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    for key, value in rope.items():
        if key != "rope_theta" and (key not in known or value != known[key]):
            raise UserError(f"config.json: rope_parameters.{key}={value!r} is not implemented; known: plain RoPE")
    return float(rope["rope_theta"])


def _check_sizes(family: str, fields: Mapping[str, Any]) -> None:
    names = FIELDS[family]
    for ours, theirs in names.items():
        if isinstance(fields[ours], int) and not isinstance(fields[ours], bool) and fields[ours] < 1:
            raise UserError(f"config.json: {theirs}={fields[ours]}: must be at least 1")
    heads, kv_heads, width = fields["heads"], fields["kv_heads"], fields["width"]
    if heads % kv_heads:
        raise UserError(f"config.json: {names['heads']}={heads} must divide by {names['kv_heads']}={kv_heads}")
    if "head_width" not in names and width % heads:
        raise UserError(f"config.json: {names['width']}={width} must divide by {names['heads']}={heads}")
    if family == "llama" and fields["head_width"] % 2:
        raise UserError(f"config.json: head_dim={fields['head_width']} must be even, for rotary positions")


def _weight_files(directory: Path, opened_by: str = "transformers' AutoModelForCausalLM.from_pretrained") -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: expected an object with `weight_map`: tensor names to file names") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index}: weight_map must name files in the same directory")
        return [directory / name for name in names]
    path = directory / "model.safetensors"
    if not path.exists():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        found = f", only {_listed(pickles)}, which can run code when read, and so is not" if pickles else ""
        raise UserError(
            f"{directory}: no model.safetensors{found}; where PyTorch is installed, "
            f"{opened_by}(DIR).save_pretrained(NEW) writes one"
        )
    return [path]


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return stack.enter_context(safe_open(path, "np"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _tensor(path: Path, file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None


def _write(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # safetensors makes files that only their owner reads
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, partial, dict(metadata))
    partial.chmod(mode)
    partial.replace(path)


def _names(family: str, arch: model.Architecture, prefix: str) -> dict[str, str]:
    head = {} if arch.tied else {"lm_head/kernel": HEAD}
    return {ours: prefix + theirs for ours, theirs in NAMES[family].items()} | head


def _shapes(arch: model.Architecture) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: model.init(arch, jax.random.key(0)))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    return {name: leaf.shape for name, leaf in flat.items()}


def _check_names(
    directory: Path,
    arch: model.Architecture,
    names: Mapping[str, str],
    stored: set[str],
    read: Callable[[str], np.ndarray],
) -> None:
    wanted = {theirs.split("#")[0].format(i) for theirs in names.values() for i in range(arch.layers)}
    if missing := wanted - stored:
        raise UserError(f"{directory}: the config asks for tensors that are not stored: {_listed(sorted(missing))}")
    unexpected = {name for name in stored - wanted if not BUFFERS.search(name)}
    if arch.tied and HEAD in unexpected:
        # Some save the tied head as well; one that differs would not be used, so it is refused.
        if not np.array_equal(read(HEAD), read(names["embed/tokens"])):
            raise UserError(f"{directory}: {HEAD} differs from the embeddings, but config.json ties them")
        unexpected -= {HEAD}
    if unexpected:
        raise UserError(f"{directory}: stores tensors that the config does not ask for: {_listed(sorted(unexpected))}")


def _listed(items: Any) -> str:
    items = [str(x) for x in items]
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _matrix(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer's leaf as they hold it, before any transposing: heads joined with their width."""
    if not ours.startswith("blocks/"):
        return shape
    if not ours.endswith("/kernel"):
        return (math.prod(shape),)
    inputs = 2 if ours == "blocks/o/kernel" else 1
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


def _transposed(family: str, ours: str) -> bool:
    return family != "gpt2" and ours.startswith("blocks/") and ours.endswith("/kernel")


def _import(
    family: str, ours: str, theirs: str, shape: tuple[int, ...], read: Callable[[str], np.ndarray], directory: Path
) -> np.ndarray:
    stacked = ours.startswith("blocks/")
    layer_shape = shape[1:] if stacked else shape
    flat_shape = _matrix(ours, layer_shape)
    name, _, part = theirs.partition("#")
    whole_shape = (*flat_shape[:-1], 3 * flat_shape[-1]) if part else flat_shape
    wanted = whole_shape[::-1] if _transposed(family, ours) else whole_shape
    layers = []
    for i in range(shape[0] if stacked else 1):
        array = read(name.format(i))
        if array.shape != wanted:
            raise UserError(f"{directory}: {name.format(i)} is {list(array.shape)}; the config asks for {list(wanted)}")
        array = array.T if _transposed(family, ours) else array
        array = np.split(array, 3, axis=-1)[int(part)] if part else array
        layers.append(array.reshape(layer_shape))
    return np.stack(layers) if stacked else layers[0]


def _export(family: str, ours: str, theirs: str, leaf: np.ndarray, tensors: Mapping[str, Any]) -> dict[str, Any]:
    if not ours.startswith("blocks/"):
        return {theirs: leaf}
    name, _, part = theirs.partition("#")
    out = {}
    for i, array in enumerate(leaf):
        array = array.reshape(_matrix(ours, array.shape))
        array = array.T if _transposed(family, ours) else array
        # The thirds of a fused matrix come in order, each after the ones before it.
        fused = int(part or 0) > 0
        out[name.format(i)] = np.concatenate([tensors[name.format(i)], array], -1) if fused else array
    return out
