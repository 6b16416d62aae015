import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest

from jaxrlhf import experiment, families, model
from jaxrlhf.config import Experiment, Model
from jaxrlhf.families import architecture
from jaxrlhf.files import UserError

HF = Path(__file__).parent / "golden" / "hf"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_every_leaf_of_every_family_has_a_name_of_its_own():
    sizes = {"vocab_size": 8, "layers": 1, "width": 4, "heads": 2, "kv_heads": 2, "head_width": 4, "ff_width": 6}
    assert model.FAMILIES.keys() == families.MODULES.keys() == families.FIELDS.keys()
    for family, options in model.FAMILIES.items():
        narrow = {"embed_width": 2} if family == "opt" else {}
        arch = model.Architecture(**(sizes | {"max_positions": 4} | options | narrow))
        params = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
        leaves = ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        assert len({families.tensor_name(family, leaf, "") for leaf in leaves}) == len(leaves)
        modules = {leaf if leaf.startswith("embed/") else leaf.rpartition("/")[0] for leaf in leaves} - {"lm_head"}
        assert modules == families.MODULES[family].keys()


def test_architecture_fills_in_defaults_and_reads_both_spellings_of_rope():
    opt = architecture({"model_type": "opt"})  # OPT-125M
    assert (opt.vocab_size, opt.layers, opt.width, opt.heads, opt.ff_width) == (50272, 12, 768, 12, 3072)
    assert (opt.max_positions, opt.position_offset, opt.tied, opt.head_width) == (2048, 2, True, 64)
    llama = architecture({"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5})
    assert (llama.kv_heads, llama.rope_theta, llama.tied, llama.norm_eps) == (8, 5e5, False, 1e-6)
    assert architecture({"model_type": "llama", "rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0
    gpt2 = architecture({"model_type": "gpt2", "n_embd": 12, "n_head": 3})
    assert (gpt2.ff_width, gpt2.kv_heads, gpt2.head_width) == (48, 3, 4)


# Configs as the hub has them, of the options that tell the families apart.
PUBLISHED = [
    (
        {"model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        {"norm_place": "post", "final_norm": False, "embed_width": 512},
    ),
    ({"model_type": "opt", "_remove_final_layer_norm": True}, {"norm_place": "pre", "final_norm": False}),
    ({"model_type": "opt", "enable_bias": False}, {"qkv_bias": False, "o_bias": False, "mlp_bias": False}),
    (
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
        {"rope_theta": 5e5, "rope_scaling": (8.0, 1.0, 4.0, 8192.0)},
    ),
    (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "pretraining_tp": 1},
        {"rope_scaling": (2.0,)},
    ),
    ({"model_type": "llama", "attention_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": False}),
    ({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 4096}, {"windows": (4096, 4096)}),
    ({"model_type": "mistral", "sliding_window": None}, {"windows": (), "kv_heads": 8}),
    (
        {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False},
        {"windows": (), "qkv_bias": True, "o_bias": False},
    ),
    (
        {
            "model_type": "qwen2",
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 2,
        },
        {"windows": (0, 0, 64)},
    ),
    (
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8},
        {"qk_norm": True, "head_width": 128},
    ),
    (
        {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu"},
        {"rope_share": 0.25, "rope_theta": 1e4, "parallel": True, "tied": False, "activation": "gelu"},
    ),
    (
        {
            "model_type": "gemma2",
            "num_hidden_layers": 4,
            "cache_implementation": "hybrid",
            "query_pre_attn_scalar": 144,
        },
        {"windows": (4096, 0, 4096, 0), "query_scalar": 144, "attn_softcap": 50.0, "final_softcap": 30.0},
    ),
    ({"model_type": "gemma2", "attn_logit_softcapping": None}, {"attn_softcap": 0.0, "norm": "rms_plus_one"}),
]


@pytest.mark.parametrize(("config", "wanted"), PUBLISHED)
def test_published_options_are_read_and_written_back(config, wanted):
    arch = architecture(config)
    assert {key: getattr(arch, key) for key in wanted} == wanted
    arch = replace(arch, remat="none")
    assert architecture(families.config_of(arch)) == arch
    assert architecture(families.config_of(replace(arch, dtype="bfloat16", remat="full"))) == arch


@pytest.mark.parametrize("name", sorted(p.name for p in HF.iterdir()))
def test_configs_that_transformers_wrote_are_written_back(name):
    config = json.loads((HF / name / "config.json").read_text())
    written = families.config_of(architecture(config))
    bookkeeping = ("max_window_layers", "n_inner")  # which follow from layer_types, and from n_embd
    assert {k: v for k, v in written.items() if config[k] != v and k not in bookkeeping} == {}


@pytest.mark.parametrize("family", model.FAMILIES)
def test_what_a_family_is_from_scratch_its_own_config_can_say(family):
    sizes = Model(family=family, layers=3, width=32, heads=4, ff_width=40, prompt_length=11, response_length=6)
    arch = experiment.architecture(Experiment(model=sizes), 301)
    arch = replace(arch, remat="none")
    assert architecture(families.config_of(arch)) == arch
    assert architecture(families.config_of(replace(arch, dtype="bfloat16", remat="full"))) == arch
    if family == "gemma2":
        assert (arch.windows, arch.query_scalar) == ((4096, 0, 4096), 8)


def test_an_architecture_that_its_family_cannot_say_is_refused():
    arch = architecture({"model_type": "llama"})
    for options in ({"parallel": True}, {"windows": (4,) * 32}, {"o_bias": True}, {"qk_norm": True}):
        with pytest.raises(UserError, match="llama has no architecture like"):
            families.config_of(model.Architecture(**(vars(arch) | options)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({}, "model_type"),
        ([], "model_type"),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ({"model_type": "opt", "activation_function": "quick_gelu"}, "activation_function"),
        ({"model_type": "opt", "num_attention_heads": 7}, "num_attention_heads"),
        ({"model_type": "opt", "num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "gemma2", "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 1000"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer"),
        ({"model_type": "llama", "hidden_act": "quick_gelu"}, "hidden_act"),
        ({"model_type": "llama", "clip_qkv": 8.0}, "clip_qkv"),
        ({"model_type": "llama", "sliding_window": 512}, "sliding_window"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "modeling.Own"}}, "auto_map"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "longrope",
        ),
        ({"model_type": "llama", "rope_scaling": LLAMA3 | {"beta_fast": 32}}, "beta_fast"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads"),
        ({"model_type": "llama", "head_dim": 5}, "head_dim"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window"),
        ({"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_window"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.01}, "rotary"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_options_that_the_decoder_lacks_are_refused_by_name(config, named):
    with pytest.raises(UserError, match=named) as error:
        architecture(config)
    assert "\n" not in str(error.value)
