"""Encoders out of Hugging Face directories: sentence-transformers' and sequence classifiers'.

What a directory's settings ask for is done or refused by name, never passed over. Sources: sentence-transformers 6.2
(`Transformer`, `Pooling` and `Normalize` modules), transformers 5.24 (`BertForSequenceClassification`,
`RobertaForSequenceClassification`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxrlhf import shards
from jaxrlhf.evaluation.encoders import ACTIVATIONS, POOLINGS, Architecture, Classifier, SentenceEncoder
from jaxrlhf.files import UserError, read_json
from jaxrlhf.types import Params

FAMILIES: dict[str, dict[str, Any]] = {"bert": {"after_pad": False}, "roberta": {"after_pad": True}}
# Fields of `Architecture`: their names in config.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "ff_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "pad_id": "pad_token_id",
}
# The layers of a classifier's head, before tanh and after it.
HEADS = {
    "bert": {"head/dense": "bert.pooler.dense", "head/out": "classifier"},
    "roberta": {"head/dense": "classifier.dense", "head/out": "classifier.out_proj"},
}
EMBEDDINGS = {
    "embed/tokens": "embeddings.word_embeddings.weight",
    "embed/positions": "embeddings.position_embeddings.weight",
    "embed/types": "embeddings.token_type_embeddings.weight",
}
NORMS = {
    "embed/norm": "embeddings.LayerNorm",
    "blocks/attn_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blocks/mlp_norm": "encoder.layer.{}.output.LayerNorm",
}
LINEARS = {
    "blocks/q": "encoder.layer.{}.attention.self.query",
    "blocks/k": "encoder.layer.{}.attention.self.key",
    "blocks/v": "encoder.layer.{}.attention.self.value",
    "blocks/o": "encoder.layer.{}.attention.output.dense",
    "blocks/up": "encoder.layer.{}.intermediate.dense",
    "blocks/down": "encoder.layer.{}.output.dense",
}
# What is stored beside an encoder and has no part in its output: buffers, and the heads of its pretraining.
UNUSED = re.compile(r"^((bert|roberta)\.)?(embeddings\.(position|token_type)_ids$|pooler\.dense\.)|^(cls|lm_head)\.")

# Options of which only these values are implemented. None allows all: it is read below, or has no part in the output.
CONFIG: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}
TRANSFORMER: dict[str, tuple[Any, ...] | None] = {
    "max_seq_length": None,
    "do_lower_case": (True, False),
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "module_output_name": ("token_embeddings",),
    "processing_kwargs": ({}, None),
    "unpad_inputs": None,
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "model_args": ({},),
    "config_args": ({},),
    "tokenizer_args": ({},),
}
LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
NORMALISE: dict[str, tuple[Any, ...] | None] = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}
SENTENCE_TRANSFORMERS: dict[str, tuple[Any, ...] | None] = {
    "__version__": None,
    "prompts": None,
    "default_prompt_name": None,
    "similarity_fn_name": None,
    "model_type": ("SentenceTransformer",),
}


def load_sentence_encoder(directory: Path) -> SentenceEncoder:
    """Reads a sentence-transformers directory: modules.json, and the modules' own directories and files.

    Raises:
      UserError: a file is missing or broken, a tensor is missing, unexpected or of the wrong shape, or a module or an
        option is not implemented; names the file, and the tensor or option.
    """
    paths = _modules(directory)
    settings = _transformer_settings(paths["Transformer"])
    arch, _ = _architecture(paths["Transformer"] / "config.json")
    pooling = _pooling(paths["Pooling"] / "config.json", arch.width)
    normalise = "Normalize" in paths
    if normalise and (path := paths["Normalize"] / "config.json").exists():
        _check(path, read_json(path), NORMALISE)
    _check_prompts(directory / "config_sentence_transformers.json")
    tokenizer = _tokenizer(paths["Transformer"], arch)
    if settings.get("do_lower_case"):
        _lower(tokenizer)
    params = _params(paths["Transformer"], arch, {}, "sentence_transformers.SentenceTransformer")
    length = settings.get("max_seq_length") or tokenizer.model_max_length  # either can exceed what the model has
    return SentenceEncoder(arch, params, tokenizer, min(length, arch.context), pooling, normalise)


def load_classifier(directory: Path) -> Classifier:
    """Reads a sequence-classification directory; its labels are the config's `id2label`. Raises as above."""
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"{path}: no such file; an NLI model is a directory as transformers saves a sequence classifier"
        )
    arch, config = _architecture(path)
    names = config["id2label"]
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{path}: id2label must name the labels 0 to {len(names) - 1}; it has {sorted(names)}")
    labels = tuple(names[i] for i in range(len(names)))
    D = arch.width
    sizes = {"head/dense": (D, D), "head/out": (len(labels), D)}
    tokenizer = _tokenizer(directory, arch)
    types = tokenizer("a", "b").get("token_type_ids", [0])
    if max(types) >= arch.token_types:
        raise UserError(f"{path}: type_vocab_size={arch.token_types}, but the tokenizer has {max(types) + 1} types")
    head = {ours: (theirs, sizes[ours]) for ours, theirs in HEADS[config["model_type"]].items()}
    params = _params(directory, arch, head, "transformers' AutoModelForSequenceClassification.from_pretrained")
    return Classifier(arch, params, tokenizer, min(tokenizer.model_max_length, arch.context), labels)


def _modules(directory: Path) -> dict[str, Path]:
    """Where each of the encoder's modules is."""
    path = directory / "modules.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; a sentence encoder is a directory as sentence-transformers saves it")
    modules = read_json(path)
    try:
        paths = {str(m["type"]).rpartition(".")[2]: str(m["path"]) for m in sorted(modules, key=lambda m: m["idx"])}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: expected a list of objects with `idx`, `path` and `type`") from None
    chains = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if len(paths) != len(modules) or list(paths) not in chains:
        raise UserError(
            f"{path}: modules {', '.join(paths) or 'none'} are not implemented; known: Transformer, Pooling and, "
            "last and optional, Normalize"
        )
    if any(Path(name).name != name or name == ".." for name in paths.values()):
        raise UserError(f"{path}: `path` must name a directory beside it")
    return {name: directory / inner for name, inner in paths.items()}


def _check(path: Path, config: Any, known: Mapping[str, tuple[Any, ...] | None], strict: bool = True) -> None:
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected an object, found {type(config).__name__}")
    for key, value in config.items():
        if key not in known:
            if strict:
                raise UserError(f"{path}: {key}={value!r} is not implemented; known: {', '.join(known)}")
            continue
        values = known[key]
        if values is not None and value not in values:
            raise UserError(f"{path}: {key}={value!r} is not implemented; known: {', '.join(map(str, values))}")


def _transformer_settings(directory: Path) -> dict[str, Any]:
    names = ("sentence_bert_config.json", "sentence_roberta_config.json")
    path = next((p for name in names if (p := directory / name).exists()), None)
    if path is None:
        return {}
    settings = read_json(path)
    _check(path, settings, TRANSFORMER)
    length = settings.get("max_seq_length")
    if length is not None and (not isinstance(length, int) or length < 3):
        raise UserError(f"{path}: max_seq_length={length!r}: must be a whole number, at least 3, or null")
    return settings


def _pooling(path: Path, width: int) -> str:
    config = read_json(path)
    sizes = {"embedding_dimension": (width,), "word_embedding_dimension": (width,)}
    _check(path, config, sizes | dict.fromkeys(["pooling_mode", "include_prompt", *LEGACY_POOLING]))
    modes = config.get("pooling_mode") or [m for key, m in LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"{path}: pooling_mode={' and '.join(map(str, modes))} is not implemented; known: {' or '.join(POOLINGS)}"
        )
    return modes[0]


def _check_prompts(path: Path) -> None:
    if not path.exists():
        return
    config = read_json(path)
    _check(path, config, SENTENCE_TRANSFORMERS)
    name = config.get("default_prompt_name")
    if name is not None and (config.get("prompts") or {}).get(name) != "":
        raise UserError(f"{path}: default_prompt_name={name!r}: a prompt before every text is not implemented")


def _architecture(path: Path) -> tuple[Architecture, dict[str, Any]]:
    """The encoder that a config describes, and the config with transformers' defaults filled in."""
    from transformers import AutoConfig  # seconds to import, and needed here only

    given = read_json(path)
    _check(path, given, CONFIG, strict=False)
    if "model_type" not in given:
        raise UserError(f"{path}: no model_type; known: {', '.join(FAMILIES)}")
    family = given["model_type"]
    try:
        full = AutoConfig.for_model(family, **{k: v for k, v in given.items() if k != "model_type"}).to_dict()
    except Exception as error:  # whatever transformers raises on a bad value, the value is the user's
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    fields = {ours: full[theirs] for ours, theirs in FIELDS.items()}
    for ours, theirs in FIELDS.items():
        if ours not in ("activation", "norm_eps", "pad_id") and fields[ours] < 1:
            raise UserError(f"{path}: {theirs}={fields[ours]}: must be at least 1")
    if full["hidden_size"] % full["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size={full['hidden_size']} must divide by num_attention_heads")
    if full["pad_token_id"] not in range(full["vocab_size"]):
        raise UserError(f"{path}: pad_token_id={full['pad_token_id']!r}: must be a token of the vocabulary")
    arch = Architecture(**fields, **FAMILIES[family])
    if arch.context < 3:
        raise UserError(f"{path}: max_position_embeddings={arch.max_positions} leaves no room for a text")
    return arch, full


def _params(
    directory: Path, arch: Architecture, head: dict[str, tuple[str, tuple[int, ...]]], opened_by: str
) -> Params:
    """Parameters as f32 arrays on the device, kernels as [inputs, outputs], the blocks' stacked by layer."""
    stored = shards.stored(directory, opened_by)
    word = EMBEDDINGS["embed/tokens"]
    prefix = next((p for p in ("", *(f"{family}." for family in FAMILIES)) if p + word in stored), "")
    rows = _rows(arch, prefix) | _linear_rows(head)
    wanted = {name.format(i) for name, _ in rows.values() for i in range(arch.layers)}
    if missing := sorted(wanted - set(stored)):
        raise UserError(f"{directory}: the config asks for tensors that are not stored: {_some(missing)}")
    if unexpected := sorted(name for name in set(stored) - wanted if not UNUSED.search(name)):
        raise UserError(f"{directory}: stores tensors that the encoder does not use: {_some(unexpected)}")
    flat = {}
    for ours, (theirs, shape) in rows.items():
        layers = [_array(stored, theirs.format(i), shape) for i in range(arch.layers if "{}" in theirs else 1)]
        array = np.stack(layers) if "{}" in theirs else layers[0]
        flat[ours] = jnp.asarray(np.swapaxes(array, -1, -2) if ours.endswith("/kernel") else array)
    return traverse_util.unflatten_dict(flat, sep="/")


def _rows(arch: Architecture, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our leaves: their tensors and a layer's shape, as stored."""
    D, F = arch.width, arch.ff_width
    lengths = {"embed/tokens": arch.vocab_size, "embed/positions": arch.max_positions, "embed/types": arch.token_types}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {n: (prefix + t, (lengths[n], D)) for n, t in EMBEDDINGS.items()}
    for ours, theirs in NORMS.items():
        rows[f"{ours}/scale"] = (f"{prefix}{theirs}.weight", (D,))
        rows[f"{ours}/bias"] = (f"{prefix}{theirs}.bias", (D,))
    sizes = {"blocks/up": (F, D), "blocks/down": (D, F)}
    return rows | _linear_rows({ours: (prefix + theirs, sizes.get(ours, (D, D))) for ours, theirs in LINEARS.items()})


def _linear_rows(linears: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows = {}
    for ours, (theirs, shape) in linears.items():
        rows[f"{ours}/kernel"] = (f"{theirs}.weight", shape)
        rows[f"{ours}/bias"] = (f"{theirs}.bias", shape[:1])
    return rows


def _array(stored: Mapping[str, Path], name: str, shape: tuple[int, ...]) -> np.ndarray:
    path = stored[name]
    array = shards.read(path, name)
    if array.shape != shape:
        raise UserError(f"{path}: tensor {name} is {list(array.shape)}; the config asks for {list(shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{path}: tensor {name} is {array.dtype}; expected f32, f16 or bf16")
    return array.astype(np.float32)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _tokenizer(directory: Path, arch: Architecture) -> Any:
    from transformers import AutoTokenizer

    # Without a vocabulary, transformers makes a tokenizer that knows its special tokens alone.
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise UserError(f"{directory}: no tokenizer.json, vocab.txt or vocab.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
    except Exception as error:  # the tokenizers' library raises no narrower kind
        raise UserError(f"{directory}: the tokenizer cannot be read ({' '.join(str(error).split())})") from None
    if largest >= arch.vocab_size:
        raise UserError(
            f"{directory}: config.json: vocab_size={arch.vocab_size}; the tokenizer has {largest + 1} tokens"
        )
    return tokenizer


def _lower(tokenizer: Any) -> None:
    from tokenizers import normalizers

    engine = tokenizer.backend_tokenizer
    rest = [engine.normalizer] if engine.normalizer else []
    engine.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
