import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf import model, weights
from jaxrlhf.files import UserError
from jaxrlhf.split import split

GOLDEN = Path(__file__).parent / "golden"
HF = GOLDEN / "hf"
FAMILIES = ("opt", "llama_tied", "llama_untied", "gpt2")
CASES = ("left", "right", "length_1", "batch_1", "full")
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def maker():
    spec = importlib.util.spec_from_file_location("make_hf_logits", GOLDEN / "make_hf_logits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@partial(jax.jit, static_argnames="arch")
def our_logits(arch, params, tokens_BT, mask_BT):
    """With nothing frozen, and with four fifths frozen."""

    def logits(freeze_layers):
        frozen, top = split(params, freeze_layers)
        hidden_BTD = model.trunk(arch, frozen, tokens_BT, mask_BT)
        return model.logits(arch, frozen, top, model.run_top(arch, top, tokens_BT, hidden_BTD, mask_BT))

    return logits(0.0), logits(0.8)


def stacked(cases: list[np.ndarray]) -> np.ndarray:
    """All cases as one batch, padded on the right: one shape to compile."""
    length = max(x.shape[1] for x in cases)
    return np.concatenate([np.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in cases])


def copy_of(name: str, tmp_path: Path, config: dict | None = None) -> Path:
    directory = tmp_path / name
    shutil.copytree(HF / name, directory)
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_torch_model(name):
    arch, params = weights.load(HF / name)
    golden = load_file(HF / name / "logits.safetensors")
    tokens_BT, mask_BT, wanted_BTV = (
        stacked([golden[f"{c}/{k}"] for c in CASES]) for k in ("tokens", "mask", "logits")
    )
    for ours_BTV in our_logits(arch, params, tokens_BT, mask_BT):
        assert np.abs(ours_BTV - wanted_BTV)[mask_BT > 0].max() < 1e-4
    assert np.abs(wanted_BTV).max() > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_a_fresh_torch_model_and_go_back(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    make = maker()
    theirs = make.random_model(make.FAMILIES[name], seed=99)
    theirs.save_pretrained(tmp_path / "theirs")
    arch, params = weights.load(tmp_path / "theirs")
    weights.export(tmp_path / "ours", arch, params, SPECIAL)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert back.config.eos_token_id == 1
    cases = make.inputs(99).values()
    tokens_BT, mask_BT = (stacked([case[i] for case in cases]) for i in (0, 1))
    ours_BTV = our_logits(arch, params, tokens_BT, mask_BT)[1]
    for other in (theirs, back):
        wanted_BTV = stacked([make.logits(other, *case) for case in cases])
        assert np.abs(ours_BTV - wanted_BTV)[mask_BT > 0].max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_export_and_load_return_the_same_bytes(name, tmp_path):
    arch, params = weights.load(HF / name)
    weights.export(tmp_path, arch, params, SPECIAL)
    again_arch, again = weights.load(tmp_path)
    assert again_arch == arch
    assert_same(again, params)
    stored, exported = (load_file(d / "model.safetensors") for d in (HF / name, tmp_path))
    assert stored.keys() == exported.keys()
    assert all(np.array_equal(stored[k], exported[k]) for k in stored)


def test_names_cover_every_leaf_and_nothing_else():
    sizes = {"vocab_size": 8, "layers": 1, "width": 4, "heads": 2, "kv_heads": 2, "head_width": 2, "ff_width": 6}
    for family, options in model.FAMILIES.items():
        arch = model.Architecture(**sizes, max_positions=4, **options)
        params = jax.eval_shape(partial(model.init, arch), jax.random.key(0))
        leaves = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        assert leaves == set(weights.NAMES[family])


def test_architecture_fills_in_defaults_and_reads_both_spellings_of_rope():
    opt = weights.architecture({"model_type": "opt"})  # OPT-125M
    assert (opt.vocab_size, opt.layers, opt.width, opt.heads, opt.ff_width) == (50272, 12, 768, 12, 3072)
    assert (opt.max_positions, opt.position_offset, opt.tied, opt.head_width) == (2048, 2, True, 64)
    llama = weights.architecture({"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5})
    assert (llama.kv_heads, llama.rope_theta, llama.tied, llama.norm_eps) == (8, 5e5, False, 1e-6)
    assert weights.architecture({"model_type": "llama", "rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0
    gpt2 = weights.architecture({"model_type": "gpt2", "n_embd": 12, "n_head": 3})
    assert (gpt2.ff_width, gpt2.kv_heads, gpt2.head_width) == (48, 3, 4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({}, "model_type"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, "word_embed_proj_dim"),
        ({"model_type": "opt", "activation_function": "gelu"}, "activation_function"),
        ({"model_type": "opt", "enable_bias": False}, "enable_bias"),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ({"model_type": "opt", "num_attention_heads": 7}, "num_attention_heads"),
        ({"model_type": "opt", "num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads"),
        ({"model_type": "llama", "head_dim": 5}, "head_dim"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_options_that_the_decoder_lacks_are_refused_by_name(config, named):
    with pytest.raises(UserError, match=named) as error:
        weights.architecture(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("opt", lambda t: t.pop("model.decoder.layers.1.fc2.bias"), r"not stored: .*\.layers\.1\.fc2\.bias$"),
        ("opt", lambda t: t.update(extra=np.zeros(2, np.float32)), "does not ask for: extra$"),
        ("gpt2", lambda t: t.update({"transformer.wpe.weight": np.zeros((11, 24), np.float32)}), r"wpe.*\[12, 24\]"),
        ("llama_untied", lambda t: t.pop("lm_head.weight"), r"lm_head\.weight"),
        ("llama_tied", lambda t: t.update({"lm_head.weight": np.ones((53, 24), np.float32)}), "lm_head.weight differs"),
        ("llama_tied", lambda t: t.update({"model.norm.weight": np.ones(24, np.int8)}), "model.norm.weight is int8"),
    ],
)
def test_wrong_tensors_are_named(name, change, named, tmp_path):
    directory = copy_of(name, tmp_path)
    change_tensors(directory, change)
    with pytest.raises(UserError, match=named):
        weights.load(directory)


def test_a_transposed_projection_is_refused(tmp_path):
    directory = copy_of("opt", tmp_path)
    name = "model.decoder.layers.0.fc1.weight"
    change_tensors(directory, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    with pytest.raises(UserError, match=r"layers\.0\.fc1\.weight is \[24, 40\]; the config asks for \[40, 24\]"):
        weights.load(directory)


def test_a_config_of_other_sizes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"layers\.3\..* and 12 more"):
        weights.load(copy_of("opt", tmp_path, {"num_hidden_layers": 4}))


def test_older_layouts_are_read(tmp_path):
    """Names without prefix, stored masks and a stored copy of the tied head, as in the first GPT-2 and OPT files."""
    wanted = weights.load(HF / "gpt2")[1]
    directory = copy_of("gpt2", tmp_path)

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {"h.0.attn.bias": np.ones((1, 1, 12, 12), np.uint8), "lm_head.weight": tensors["wte.weight"]}

    change_tensors(directory, older)
    assert_same(weights.load(directory)[1], wanted)


def test_shards_and_half_precision_are_read_as_stored(tmp_path):
    directory = copy_of("llama_untied", tmp_path)
    whole = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({k: whole[k] for k in part}, directory / file)
    index = {"weight_map": {k: file for file, part in shards.items() for k in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    params = weights.load(directory)[1]
    assert params["lm_head"]["kernel"].dtype == ml_dtypes.bfloat16
    f32 = weights.load(HF / "llama_untied")[1]
    assert_same(params, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), f32))
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="same directory"):
        weights.load(directory)


def test_pickles_are_not_read(tmp_path):
    directory = copy_of("opt", tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin.*save_pretrained"):
        weights.load(directory)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        weights.load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        weights.load_params(tmp_path / "base.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_our_own_file_comes_back_exactly(dtype, tmp_path):
    for name in ("opt", "llama_untied"):
        params = jax.tree.map(lambda x: x.astype(dtype), weights.load(HF / name)[1])
        weights.save_params(tmp_path / "deep" / "base.safetensors", params, {"seed": "0", "made by": "a test"})
        again, metadata = weights.load_params(tmp_path / "deep" / "base.safetensors")
        assert_same(again, params)
        assert metadata == {"seed": "0", "made by": "a test"}
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["base.safetensors"]


def test_our_own_file_keeps_shapes_of_jax_arrays_and_scalars(tmp_path):
    params = {"embed": {"tokens": jax.numpy.arange(6.0).reshape(2, 3).T}, "final_norm": {"b": np.float32(2.5)}}
    weights.save_params(tmp_path / "x.safetensors", params, {})
    again, _ = weights.load_params(tmp_path / "x.safetensors")
    assert again["final_norm"]["b"].shape == ()
    assert np.array_equal(again["embed"]["tokens"], [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_cut_files_are_refused(keep, tmp_path):
    path = tmp_path / "base.safetensors"
    weights.save_params(path, weights.load(HF / "opt")[1], {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        weights.load_params(path)
