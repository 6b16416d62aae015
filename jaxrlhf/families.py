"""Hugging Face families: whose config fields and tensor names mean what. Tables, and how rows of them are read.

A family is a row of `MODULES` (names), `FIELDS` (what of its config is a field of `model.Architecture`) and `ONLY`
(what of its config must have certain values). Whatever else a config holds must be in `INERT`, or off: nothing is
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxrlhf import model
from jaxrlhf.files import UserError, listed

_LLAMA = {
    "embed/tokens": "embed_tokens",
    "blocks/attn_norm": "layers.{}.input_layernorm",
    "blocks/q": "layers.{}.self_attn.q_proj",
    "blocks/k": "layers.{}.self_attn.k_proj",
    "blocks/v": "layers.{}.self_attn.v_proj",
    "blocks/o": "layers.{}.self_attn.o_proj",
    "blocks/mlp_norm": "layers.{}.post_attention_layernorm",
    "blocks/gate": "layers.{}.mlp.gate_proj",
    "blocks/up": "layers.{}.mlp.up_proj",
    "blocks/down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
}
# Our modules: theirs, without the prefix that a model with an output head adds. `#i` is a third of a fused tensor.
MODULES: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"blocks/q_norm": "layers.{}.self_attn.q_norm", "blocks/k_norm": "layers.{}.self_attn.k_norm"},
    "gemma2": _LLAMA
    | {
        "blocks/attn_post_norm": "layers.{}.post_attention_layernorm",
        "blocks/mlp_norm": "layers.{}.pre_feedforward_layernorm",
        "blocks/mlp_post_norm": "layers.{}.post_feedforward_layernorm",
    },
    "opt": {
        "embed/tokens": "embed_tokens",
        "embed/positions": "embed_positions",
        "embed/project_in": "project_in",
        "embed/project_out": "project_out",
        "blocks/attn_norm": "layers.{}.self_attn_layer_norm",
        "blocks/q": "layers.{}.self_attn.q_proj",
        "blocks/k": "layers.{}.self_attn.k_proj",
        "blocks/v": "layers.{}.self_attn.v_proj",
        "blocks/o": "layers.{}.self_attn.out_proj",
        "blocks/mlp_norm": "layers.{}.final_layer_norm",
        "blocks/up": "layers.{}.fc1",
        "blocks/down": "layers.{}.fc2",
        "final_norm": "final_layer_norm",
    },
    "gpt2": {
        "embed/tokens": "wte",
        "embed/positions": "wpe",
        "blocks/attn_norm": "h.{}.ln_1",
        "blocks/q": "h.{}.attn.c_attn#0",
        "blocks/k": "h.{}.attn.c_attn#1",
        "blocks/v": "h.{}.attn.c_attn#2",
        "blocks/o": "h.{}.attn.c_proj",
        "blocks/mlp_norm": "h.{}.ln_2",
        "blocks/up": "h.{}.mlp.c_fc",
        "blocks/down": "h.{}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    "gpt_neox": {
        "embed/tokens": "embed_in",
        "blocks/attn_norm": "layers.{}.input_layernorm",
        "blocks/q": "layers.{}.attention.query_key_value#0",
        "blocks/k": "layers.{}.attention.query_key_value#1",
        "blocks/v": "layers.{}.attention.query_key_value#2",
        "blocks/o": "layers.{}.attention.dense",
        "blocks/mlp_norm": "layers.{}.post_attention_layernorm",
        "blocks/up": "layers.{}.mlp.dense_h_to_4h",
        "blocks/down": "layers.{}.mlp.dense_4h_to_h",
        "final_norm": "final_layer_norm",
    },
}
# What a model with an output head puts before its base model's names, and the names that were seen without.
PREFIXES = dict.fromkeys(MODULES, ("model.", "")) | {
    "opt": ("model.decoder.", "decoder.", ""),
    "gpt2": ("transformer.", ""),
    "gpt_neox": ("gpt_neox.", ""),
}
HEADS = dict.fromkeys(MODULES, "lm_head.weight") | {"gpt_neox": "embed_out.weight"}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "opt": "OPT",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNeoX",
}

_COMMON = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_ROPE = _COMMON | {
    "kv_heads": "num_key_value_heads",
    "ff_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
}
# Fields of `model.Architecture`: their names in config.json.
FIELDS: dict[str, dict[str, str]] = {
    "llama": _ROPE | {"head_width": "head_dim", "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    "mistral": _ROPE | {"head_width": "head_dim"},
    "qwen2": _ROPE,
    "qwen3": _ROPE | {"head_width": "head_dim", "qkv_bias": "attention_bias"},
    "gemma2": _ROPE
    | {
        "head_width": "head_dim",
        "activation": "hidden_activation",
        "qkv_bias": "attention_bias",
        "query_scalar": "query_pre_attn_scalar",
        "attn_softcap": "attn_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
    },
    "opt": _COMMON
    | {
        "ff_width": "ffn_dim",
        "activation": "activation_function",
        "qkv_bias": "enable_bias",
        "embed_width": "word_embed_proj_dim",
    },
    "gpt2": _COMMON
    | {
        "layers": "n_layer",
        "width": "n_embd",
        "heads": "n_head",
        "ff_width": "n_inner",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
    },
    "gpt_neox": _COMMON
    | {
        "ff_width": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "qkv_bias": "attention_bias",
        "parallel": "use_parallel_residual",
    },
}
# What `_derived` reads beside them.
DERIVED: dict[str, tuple[str, ...]] = {
    "mistral": ("sliding_window",),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    "qwen3": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    "gemma2": ("sliding_window", "layer_types"),
    "opt": ("do_layer_norm_before", "_remove_final_layer_norm"),
    "gpt_neox": ("rotary_pct", "rotary_emb_base"),
}
MOST_LAYERS = 1000  # a slip or worse: transformers makes lists of so many
ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
# Options of which the decoder implements only these values.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "opt": {"layer_norm_elementwise_affine": (True,)},
    "gpt2": {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "gemma2": {"use_bidirectional_attention": (None, False)},
}
# Theirs: ours.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Of training, of generating, of bookkeeping: no logit hangs on them.
INERT = re.compile(
    r"architectures|model_type|_?name_or_path|(torch_)?dtype|transformers_version|tokenizer_class|task_specific_params"
    r"|(bos|eos|pad|sep|decoder_start|forced_bos|forced_eos)_token_id|id2label|label2id|problem_type|prefix"
    r"|.*dropout(_prob)?|layerdrop|(attn|embd|resid)_pdrop|init_std|initializer_range|gradient_checkpointing"
    r"|_?attn_implementation|cache_implementation|chunk_size_feed_forward|pretraining_tp|reorder_and_upcast_attn"
    r"|use_(cache|bfloat16|return_dict)|return_dict|torchscript|output_(attentions|hidden_states|projection)"
    r"|share_decoder_input_output_embed|is_decoder|n_ctx|model_max_length|max_sequence_length|summary_.*"
    r"|do_sample|early_stopping|(max|min)_(length|new_tokens)|no_repeat_ngram_size|num_beam(s|_groups)"
    r"|num_return_sequences|(diversity|length|repetition)_penalty|temperature|top_[kp]|typical_p|jaxrlhf_score_bias"
)


def architecture(config: Mapping[str, Any]) -> model.Architecture:
    """The decoder that a Hugging Face config describes, transformers' defaults filled in.

    Raises:
      UserError: names the first option that the decoder does not implement, and what it implements.
    """
    family = config.get("model_type") if isinstance(config, Mapping) else None
    if family not in FIELDS:
        raise UserError(f"config.json: model_type={family!r}: expected one of {', '.join(FIELDS)}")
    for key in ("num_hidden_layers", FIELDS[family]["layers"]):
        if isinstance(value := config.get(key), int) and value > MOST_LAYERS:
            raise UserError(f"config.json: {key}={value}: must be at most {MOST_LAYERS}")
    full = _filled(family, config)
    for key, values in ONLY.get(family, {}).items():
        if full[key] not in values:
            raise UserError(f"config.json: {key}={full[key]!r} is not implemented; known: {listed(values)}")
    fields = {ours: full[theirs] for ours, theirs in FIELDS[family].items()}
    name = FIELDS[family]["activation"]
    if fields["activation"] not in ACTIVATIONS:
        raise UserError(
            f"config.json: {name}={fields['activation']!r} is not implemented; known: {', '.join(ACTIVATIONS)}"
        )
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    _check_sizes(family, fields)
    fields = {"kv_heads": fields["heads"], "head_width": fields["width"] // fields["heads"]} | fields
    return model.Architecture(**(model.FAMILIES[family] | fields | _derived(family, full, fields)))


def config_of(arch: model.Architecture) -> dict[str, Any]:
    """The Hugging Face config of an architecture, the inverse of `architecture`.

    Raises:
      UserError: its family has no such options.
    """
    family = arch.family
    config: dict[str, Any] = {"model_type": family}
    config |= {theirs: getattr(arch, ours) for ours, theirs in FIELDS[family].items()}
    # Where several of their names mean one of our activations, the family's own checkpoints have the one of the table.
    config[FIELDS[family]["activation"]] = _activation_name(family, arch.activation)
    if arch.positions == "rope":
        config["rope_parameters"] = _rope_parameters(family, arch)
    window = max(arch.windows, default=0)
    if "layer_types" in DERIVED.get(family, ()):
        config["layer_types"] = [
            "sliding_attention" if w else "full_attention" for w in arch.windows or (0,) * arch.layers
        ]
    if "sliding_window" in DERIVED.get(family, ()):
        config["sliding_window"] = window or None
    if "use_sliding_window" in DERIVED.get(family, ()):
        config |= {"use_sliding_window": bool(window), "max_window_layers": arch.layers}
    if family == "gemma2":
        config |= {f"{k}_logit_softcapping": getattr(arch, f"{k}_softcap") or None for k in ("attn", "final")}
    if family == "opt":
        before = arch.norm_place == "pre"
        config |= {"word_embed_proj_dim": arch.token_width, "do_layer_norm_before": before}
        config["_remove_final_layer_norm"] = before and not arch.final_norm
    said = replace(arch, dtype=model.Architecture.dtype, remat=model.Architecture.remat)  # these no config has
    if architecture(config) != said:
        raise UserError(f"Hugging Face's {family} has no architecture like {arch}")
    return config


def tensor_name(family: str, leaf: str, prefix: str) -> str:
    """Their tensor's name for one of our leaves, `{}` for the layer, `#i` for the third of a fused one."""
    if leaf == "lm_head/kernel":
        return HEADS[family]
    if leaf.startswith("embed/"):
        return f"{prefix}{MODULES[family][leaf]}.weight"
    module, _, kind = leaf.rpartition("/")
    name, _, part = MODULES[family][module].partition("#")
    return f"{prefix}{name}.{'bias' if kind == 'bias' else 'weight'}" + (f"#{part}" if part else "")


def _filled(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with transformers' defaults, every key of it known."""
    from transformers import AutoConfig  # seconds to import, and needed here only

    if config.get("quantization_config"):
        raise UserError("config.json: quantization_config: quantised weights are not read; use the unquantised model")
    try:
        built = AutoConfig.for_model(family, **{k: v for k, v in config.items() if k != "model_type"})
    except Exception as error:  # whatever transformers raises on a bad value, the value is the user's
        raise UserError(f"config.json: {' '.join(str(error).split())}") from None
    known = {*FIELDS[family].values(), *DERIVED.get(family, ()), *ONLY.get(family, {})}
    known |= {"hidden_act"} if family == "gemma2" else set()  # of its first checkpoints; only hidden_activation counts
    known |= set(ROPE_KEYS) if model.FAMILIES[family].get("positions") != "learned" else set()
    for key, value in config.items():
        if value and built.attribute_map.get(key, key) not in known and not INERT.fullmatch(key):
            raise UserError(f"config.json: {key}={value!r} is not implemented for {family}")
    return built.to_dict()


def _check_sizes(family: str, fields: Mapping[str, Any]) -> None:
    names = FIELDS[family]
    for ours, theirs in names.items():
        value = fields[ours]
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"config.json: {theirs}={value}: must be at least 1")
    heads, width = fields["heads"], fields["width"]
    kv_heads = fields.get("kv_heads", heads)
    if heads % kv_heads:
        raise UserError(f"config.json: {names['heads']}={heads} must divide by {names['kv_heads']}={kv_heads}")
    if "head_width" not in names and width % heads:
        raise UserError(f"config.json: {names['width']}={width} must divide by {names['heads']}={heads}")
    if "head_width" in names and fields["head_width"] % 2:
        raise UserError(f"config.json: head_dim={fields['head_width']} must be even, for rotary positions")


def _derived(family: str, full: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from several of their options, or from ours."""
    found: dict[str, Any] = {}
    if family in ("llama", "qwen3", "gemma2", "gpt_neox", "opt"):
        found["o_bias"] = fields["qkv_bias"]
    if "sliding_window" in DERIVED.get(family, ()):
        found["windows"] = _windows(full, fields["layers"])
    if model.FAMILIES[family].get("positions") != "learned":
        found |= _rope(family, full["rope_parameters"], fields["head_width"])
    if family == "gemma2":
        found |= {k: fields[k] or 0.0 for k in ("attn_softcap", "final_softcap")}
    if family == "opt":
        before = full["do_layer_norm_before"]
        found |= {"mlp_bias": fields["qkv_bias"], "norm_place": "pre" if before else "post"}
        found["final_norm"] = before and not full["_remove_final_layer_norm"]
        found["embed_width"] = fields["embed_width"] if fields["embed_width"] != fields["width"] else 0
    if family == "gpt2" and fields["ff_width"] is None:
        found["ff_width"] = 4 * fields["width"]
    return found


def _windows(full: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = full["sliding_window"]
    types = full.get("layer_types") or (["sliding_attention"] * layers if window else ["full_attention"] * layers)
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"config.json: layer_types: expected {layers} of sliding_attention or full_attention")
    sliding = [t == "sliding_attention" for t in types]
    if any(sliding) and (not isinstance(window, int) or window < 1):
        raise UserError(
            f"config.json: sliding_window={window}: must be at least 1 where layer_types has sliding_attention"
        )
    return tuple(window if s else 0 for s in sliding) if any(sliding) else ()


# The numbers that follow each type's name in `rope_scaling`.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope(family: str, rope: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind not in _ROPE_NUMBERS:
        raise UserError(f"config.json: rope type {kind!r} is not implemented; known: {', '.join(_ROPE_NUMBERS)}")
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0 and family != "gpt_neox":
        raise UserError(f"config.json: partial_rotary_factor={share} is not implemented for {family}")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_ROPE_NUMBERS[kind]}
    for key, value in rope.items():
        if key not in known and value:
            raise UserError(f"config.json: rope_parameters.{key}={value!r} is not implemented for rope type {kind!r}")
    if int(head_width * share) % 2 or not int(head_width * share):
        raise UserError(f"config.json: {share} of a head's width {head_width} must be even, for rotary positions")
    try:
        numbers = [float(rope[n]) for n in ("rope_theta", *_ROPE_NUMBERS[kind])]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"config.json: rope type {kind!r} needs the numbers {', '.join(_ROPE_NUMBERS[kind])}") from None
    return {"rope_theta": numbers[0], "rope_scaling": tuple(numbers[1:]), "rope_share": float(share)}


def _rope_parameters(family: str, arch: model.Architecture) -> dict[str, Any]:
    kind = next(k for k, numbers in _ROPE_NUMBERS.items() if len(numbers) == len(arch.rope_scaling))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": arch.rope_theta}
    rope |= dict(zip(_ROPE_NUMBERS[kind], arch.rope_scaling, strict=True))
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return rope | ({"partial_rotary_factor": arch.rope_share} if family == "gpt_neox" else {})


def _activation_name(family: str, activation: str) -> str:
    if family == "gemma2" and activation == "gelu_tanh":
        return "gelu_pytorch_tanh"
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)
