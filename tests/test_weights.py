import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_makers import GOLDEN, maker
from safetensors.numpy import load_file, save_file

from jaxrlhf import hub, model, policies, sharding, weights
from jaxrlhf.config import Mesh
from jaxrlhf.files import UserError
from jaxrlhf.sampling import Generation, sample
from jaxrlhf.split import split
from jaxrlhf.types import ScalarHead, Scorer

HF = GOLDEN / "hf"
FAMILIES = tuple(sorted(p.name for p in HF.iterdir()))
CASES = ("left", "right", "length_1", "batch_1", "full")
PAD = 2
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}


@partial(jax.jit, static_argnames="arch")
def our_logits(arch, params, tokens_BT, mask_BT):
    """With the lower blocks frozen, so that both parts of the model run."""
    frozen, top = split(params, 0.4)
    hidden_BTD = model.trunk(arch, frozen, tokens_BT, mask_BT)
    return model.logits(arch, frozen, top, model.run_top(arch, top, tokens_BT, hidden_BTD, mask_BT))


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
def test_logits_and_greedy_tokens_are_those_of_the_torch_model(name):
    arch, params = weights.load(HF / name)
    golden = load_file(HF / name / "golden.safetensors")
    tokens_BT, mask_BT, wanted_BTV = (
        stacked([golden[f"{c}/{k}"] for c in CASES]) for k in ("tokens", "mask", "logits")
    )
    ours_BTV = our_logits(arch, params, tokens_BT, mask_BT)
    assert np.abs(ours_BTV - wanted_BTV)[mask_BT > 0].max() < 1e-4
    assert np.abs(wanted_BTV).max() > 1
    greedy = Generation(golden["greedy/tokens"].shape[1], temperature=0.0, eos_id=-1)
    frozen, top = split(params, 0.4)
    drawn = sample(arch, greedy, frozen, top, golden["greedy/prompt"], golden["greedy/mask"], jax.random.key(0))  # pyright: ignore
    assert np.array_equal(drawn.tokens_BR, golden["greedy/tokens"])


def test_hidden_states_after_each_layer_are_those_of_the_torch_model():
    """Gemma 2: a window on the first and the third layer; the last states are behind the final norm."""
    arch, params = weights.load(HF / "gemma2")
    assert arch.windows == (5, 0, 5)
    golden = load_file(HF / "gemma2" / "golden.safetensors")
    mask_BT, wanted_LBTD = golden["left/mask"], golden["left/hidden"]
    position_BT, mask_BTS = model.positions(mask_BT), model.causal(mask_BT)  # pyright: ignore
    ours = [model.embed(arch, params["embed"], golden["left/tokens"], position_BT)]  # pyright: ignore
    for i in range(arch.layers):
        block = jax.tree.map(lambda x, i=i: x[i : i + 1], params["blocks"])
        ours.append(model.run_blocks(arch, block, ours[-1], position_BT, mask_BTS, first=i)[0])
    ours[-1] = model.final_norm(arch, split(params, 0)[1], ours[-1])
    for ours_BTD, wanted_BTD in zip(ours, wanted_LBTD, strict=True):
        assert np.abs(ours_BTD - wanted_BTD)[mask_BT > 0].max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_torch_model_comes_in_and_goes_back(name, tmp_path):
    """Policies as AutoModelForCausalLM, reward models as AutoModelForSequenceClassification."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    make = maker("make_hf_logits")
    theirs = make.random_model(make.FAMILIES[name], seed=99)
    theirs.save_pretrained(tmp_path / "theirs")
    arch, params = weights.load(tmp_path / "theirs")
    weights.export(tmp_path / "ours", arch, params, SPECIAL)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert type(back) is type(theirs)
    assert back.config.eos_token_id == 1
    cases = {
        k: (np.where((tokens == PAD) | (mask == 0), PAD + mask.astype(np.int32), tokens), mask)
        for k, (tokens, mask) in make.inputs(99).items()
    }  # no real token is the padding
    tokens_BT, mask_BT = (stacked([case[i] for case in cases.values()]) for i in (0, 1))
    ours_BTV = our_logits(arch, params, tokens_BT, mask_BT)
    for other in (theirs, back):
        wanted_BTV = stacked([make.logits(other, *case) for case in cases.values()])
        assert np.abs(ours_BTV - wanted_BTV)[mask_BT > 0].max() < 1e-4

    head = ScalarHead(w_D=np.random.default_rng(0).normal(0, 0.3, arch.width).astype(np.float32), b=np.float32(1.5))  # pyright: ignore
    frozen, top = split(params, 0.4)
    weights.export_reward(tmp_path / "reward", arch, params, head, SPECIAL)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    assert reward.config.num_labels == 1
    scores_B = policies.score(arch, frozen, Scorer(top=top, head=head), tokens_BT, mask_BT)
    wanted_B = np.concatenate([make.logits(reward, *case)[:, 0] for case in cases.values()])
    left_out = reward.config.jaxrlhf_score_bias
    assert left_out == (0.0 if arch.norm == "layer" and arch.final_norm else 1.5)
    assert np.abs(scores_B - wanted_B - left_out).max() < 1e-4


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


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("opt", lambda t: t.pop("model.decoder.layers.1.fc2.bias"), r"not stored: .*\.layers\.1\.fc2\.bias$"),
        ("opt", lambda t: t.update(extra=np.zeros(2, np.float32)), "does not ask for: extra$"),
        ("gpt2", lambda t: t.update({"transformer.wpe.weight": np.zeros((11, 24), np.float32)}), r"wpe.*\[24, 24\]"),
        ("gpt2", lambda t: t.pop("transformer.h.2.attn.c_attn.bias"), r"h\.2\.attn\.c_attn\.bias$"),
        ("gpt_neox", lambda t: t.pop("embed_out.weight"), r"embed_out\.weight$"),
        ("opt_post_norm", lambda t: t.pop("model.decoder.project_in.weight"), r"project_in\.weight$"),
        ("gemma2", lambda t: t.pop("model.layers.1.post_feedforward_layernorm.weight"), r"1\.post_feedforward"),
        ("qwen3", lambda t: t.pop("model.layers.2.self_attn.k_norm.weight"), r"2\.self_attn\.k_norm\.weight$"),
        ("qwen2", lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), r"0\.self_attn\.q_proj\.bias$"),
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
        tensors |= {"h.0.attn.bias": np.ones((1, 1, 24, 24), np.uint8), "lm_head.weight": tensors["wte.weight"]}

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
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(weights.load(directory, dtype=np.float32)[1])} == {np.dtype(np.float32)}
    f32 = weights.load(HF / "llama_untied")[1]
    assert_same(params, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), f32))
    for file, named in (
        ("../elsewhere.safetensors", "same directory"),
        ("c.safetensors", r"c\.safetensors: no such file"),
        ("b.safetensors", rf"index\.json: weight_map places {re.escape(names[0])} in b\.safetensors"),
    ):
        wrong = {"weight_map": index["weight_map"] | {names[0]: file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=named):
            weights.load(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "b.safetensors").write_bytes((directory / "b.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"b\.safetensors: not a whole safetensors file"):
        weights.load(directory)


def test_a_shard_that_the_index_forgets_is_named(tmp_path):
    directory = copy_of("llama_untied", tmp_path)
    whole = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for i, part in enumerate((sorted(whole)[::2], sorted(whole)[1::2]), 1):
        save_file({k: whole[k] for k in part}, directory / f"model-0000{i}-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(sorted(whole)[::2], "model-00001-of-00002.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not name model-00002-of-00002\.safetensors"):
        weights.load(directory)


def test_layers_of_different_types_are_refused_unless_a_type_is_asked_for(tmp_path):
    directory = copy_of("llama_tied", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(directory, lambda t: t.update({name: t[name].astype(np.float16)}))
    with pytest.raises(UserError, match=rf"{re.escape(name)} is float16"):
        weights.load(directory)
    assert weights.load(directory, dtype=np.float32)[1]["blocks"]["up"]["kernel"].dtype == np.float32


def test_what_is_read_lies_on_the_mesh_by_the_rules():
    mesh = sharding.make_mesh(Mesh())
    for name in ("gpt_neox", "opt_post_norm"):
        params = weights.load(HF / name, mesh)[1]
        for ours, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(sharding.place(params, mesh)), strict=True):
            assert ours.sharding == wanted.sharding


def test_a_reward_models_bias_goes_where_transformers_reads_it(tmp_path):
    head = ScalarHead(w_D=np.linspace(-1, 1, 24, dtype=np.float32), b=np.float32(0.75))  # pyright: ignore
    for name, kept in (("gpt2", 0.0), ("qwen3", 0.75), ("opt_post_norm", 0.75)):
        arch, params = weights.load(HF / name)
        weights.export_reward(tmp_path / name, arch, params, head, SPECIAL)
        assert json.loads((tmp_path / name / "config.json").read_text())["jaxrlhf_score_bias"] == kept
    biases = [load_file(d / "gpt2" / "model.safetensors")["transformer.ln_f.bias"] for d in (HF, tmp_path)]
    assert np.isclose((biases[1] - biases[0]) @ head.w_D, 0.75)
    with pytest.raises(UserError, match="pad_token_id"):
        weights.export_reward(tmp_path / "x", arch, params, head, SPECIAL | {"pad_token_id": None})
    assert not (tmp_path / "x").exists()


def test_names_that_are_no_directory_are_asked_of_the_hub(tmp_path, monkeypatch):
    assert hub.directory_of(str(HF / "opt"), "config.model.init") == HF / "opt"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"config.model.init='nobody/nothing': no such directory") as error:
        hub.directory_of("nobody/nothing", "config.model.init")
    assert "\n" not in str(error.value)


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
