import json

import ml_dtypes
import numpy as np
import pytest
from encoder_directories import MAKE, SENTENCE, TINY, change_json, change_tensors, copy_of
from safetensors.numpy import load_file

from jaxrlhf.evaluation import encoder_weights, encoders
from jaxrlhf.files import UserError


def test_pooling_and_scaling_are_as_the_directory_says(tmp_path):
    directory = copy_of("bert_sentence", tmp_path)
    scaled_UD = encoders.embed(encoder_weights.load_sentence_encoder(directory), MAKE.TEXTS)
    change_json(directory / "modules.json", json.loads((directory / "modules.json").read_text())[:2])
    plain_UD = encoders.embed(encoder_weights.load_sentence_encoder(directory), MAKE.TEXTS)
    norm_U = np.linalg.norm(plain_UD, axis=-1)
    assert np.abs(plain_UD / norm_U[:, None] - scaled_UD).max() < 1e-6
    assert norm_U.min() > 1.5
    older = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(older))
    encoder = encoder_weights.load_sentence_encoder(directory)
    assert encoder.pooling == "cls"
    assert np.abs(encoders.embed(encoder, MAKE.TEXTS) - plain_UD).max() > 0.1


def test_do_lower_case_is_obeyed(tmp_path):
    directory = copy_of("roberta_sentence", tmp_path)
    cased = encoders.embed(encoder_weights.load_sentence_encoder(directory), ["The CAT", "the cat"])
    assert np.abs(cased[0] - cased[1]).max() > 0.1
    change_json(directory / "sentence_bert_config.json", {"do_lower_case": True, "max_seq_length": 5})
    encoder = encoder_weights.load_sentence_encoder(directory)
    found = encoders.embed(encoder, ["The CAT", "the cat"])
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[1] - cased[1]).max() < 1e-6
    assert encoder.max_length == 5


def test_modules_in_directories_of_their_own_are_read(tmp_path):
    directory = copy_of("bert_sentence", tmp_path)
    wanted_UD = encoders.embed(encoder_weights.load_sentence_encoder(directory), MAKE.TEXTS)
    (directory / "0_Transformer").mkdir()
    for path in [*directory.glob("*.safetensors"), *directory.glob("token*"), directory / "sentence_bert_config.json"]:
        path.rename(directory / "0_Transformer" / path.name)
    (directory / "config.json").rename(directory / "0_Transformer" / "config.json")
    modules = json.loads((directory / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    change_json(directory / "modules.json", modules[::-1])
    found_UD = encoders.embed(encoder_weights.load_sentence_encoder(directory), MAKE.TEXTS)
    assert np.array_equal(found_UD, wanted_UD)


def test_half_precision_is_computed_in_f32(tmp_path):
    directory = copy_of("bert_sentence", tmp_path)
    change_tensors(directory, lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))
    encoder = encoder_weights.load_sentence_encoder(directory)
    assert encoder.params["blocks"]["up"]["kernel"].dtype == np.float32
    assert encoder.params["blocks"]["up"]["kernel"].shape == (3, 24, 40)
    wanted_UD = load_file(TINY / "bert_sentence" / "golden.safetensors")["embeddings"]
    assert 1e-4 < np.abs(encoders.embed(encoder, MAKE.TEXTS) - wanted_UD).max() < 0.1


@pytest.mark.parametrize(
    ("name", "file", "change", "named"),
    [
        ("bert_sentence", "config.json", {"model_type": "deberta-v2"}, r"config\.json: model_type='deberta-v2'"),
        ("bert_sentence", "config.json", {"hidden_act": "silu"}, "hidden_act='silu'.* gelu, gelu_new"),
        ("bert_sentence", "config.json", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert_sentence", "config.json", {"is_decoder": True}, "is_decoder"),
        ("bert_sentence", "config.json", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert_sentence", "config.json", {"auto_map": {"AutoModel": "its--code.py"}}, "auto_map"),
        ("bert_sentence", "config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bert_sentence", "config.json", {"num_attention_heads": 5}, "num_attention_heads"),
        ("bert_sentence", "config.json", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("bert_sentence", "config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("bert_sentence", "config.json", {"pad_token_id": None}, "pad_token_id"),
        ("bert_sentence", "config.json", {"vocab_size": 40}, "vocab_size=40; the tokenizer has 87"),
        ("roberta_sentence", "config.json", {"max_position_embeddings": 3}, "max_position_embeddings=3"),
        ("bert_sentence", "config.json", [], "expected an object"),
        ("bert_sentence", "1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "1_Pooling.*weightedmean"),
        ("bert_sentence", "1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "cls and mean"),
        ("bert_sentence", "1_Pooling/config.json", {"pooling_mode": None, "pooling_mode_max_tokens": True}, "max"),
        ("bert_sentence", "1_Pooling/config.json", {"pooling_mode": 3}, "pooling_mode=3"),
        ("bert_sentence", "1_Pooling/config.json", {"embedding_dimension": 23}, "embedding_dimension=23"),
        ("bert_sentence", "1_Pooling/config.json", {"attention": True}, "attention=True"),
        ("bert_sentence", "2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name"),
        ("bert_sentence", "sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length='long'"),
        ("bert_sentence", "sentence_bert_config.json", {"query_length": 8}, "query_length=8"),
        ("bert_sentence", "sentence_bert_config.json", {"query_prefix": "q: "}, "query_prefix='q: '"),
        (
            "bert_sentence",
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            "default_prompt_name='query'",
        ),
        ("bert_sentence", "config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("bert_sentence", "modules.json", [], "modules none"),
        ("bert_sentence", "modules.json", [{"type": "Transformer"}], "expected a list"),
        (
            "bert_sentence",
            "modules.json",
            [{"idx": i, "path": str(i), "type": f"x.{t}"} for i, t in enumerate(["Transformer", "Pooling", "Dense"])],
            "modules Transformer, Pooling, Dense are not implemented",
        ),
        (
            "bert_sentence",
            "modules.json",
            [{"idx": 0, "path": "..", "type": "Transformer"}, {"idx": 1, "path": "1", "type": "Pooling"}],
            "must name a directory beside it",
        ),
        ("bert_classifier", "config.json", {"model_type": "deberta"}, "model_type='deberta'.*bert, roberta"),
        ("bert_classifier", "config.json", {"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ("bert_classifier", "config.json", {"id2label": {"0": "no", "1": "yes"}}, r"classifier\.weight is \[3, 24\]"),
        ("bert_classifier", "config.json", {"type_vocab_size": 1}, "type_vocab_size=1.* 2 types"),
        ("roberta_classifier", "config.json", {"num_hidden_layers": 4}, r"layer\.3\.attention.* and 12 more"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, file, change, named, tmp_path):
    directory = copy_of(name, tmp_path)
    change_json(directory / file, change)
    load = encoder_weights.load_sentence_encoder if name in SENTENCE else encoder_weights.load_classifier
    with pytest.raises(UserError, match=named) as error:
        load(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"),
            r"not stored: bert.*layer\.1\.output\.dense\.bias$",
        ),
        (lambda t: t.pop("classifier.weight"), r"not stored: classifier\.weight$"),
        (lambda t: t.pop("bert.embeddings.word_embeddings.weight"), "not stored: "),
        (lambda t: t.update({"bert.encoder.layer.3.output.dense.bias": np.zeros(24, np.float32)}), "does not use: .*3"),
        (
            lambda t: t.update({"bert.encoder.layer.0.intermediate.dense.weight": np.zeros((24, 40), np.float32)}),
            r"model\.safetensors: tensor bert.*intermediate\.dense\.weight is \[24, 40\]; .* \[40, 24\]",
        ),
        (lambda t: t.update({"classifier.bias": np.ones(3, np.int8)}), r"classifier\.bias is int8"),
    ],
)
def test_wrong_tensors_are_named(change, named, tmp_path):
    directory = copy_of("bert_classifier", tmp_path)
    change_tensors(directory, change)
    with pytest.raises(UserError, match=named) as error:
        encoder_weights.load_classifier(directory)
    assert "\n" not in str(error.value)


def test_what_has_no_part_in_the_output_is_passed_over(tmp_path):
    directory = copy_of("roberta_classifier", tmp_path)
    wanted_UC = encoders.classify(encoder_weights.load_classifier(directory), MAKE.PAIRS)
    extra = {"roberta.embeddings.position_ids": np.arange(22)[None], "lm_head.bias": np.ones(269, np.float32)}
    extra["roberta.pooler.dense.weight"] = np.ones((24, 24), np.float32)
    change_tensors(directory, lambda t: t.update(extra))
    assert np.array_equal(encoders.classify(encoder_weights.load_classifier(directory), MAKE.PAIRS), wanted_UC)


def test_missing_broken_and_pickled_files_are_named(tmp_path):
    for load, file in (
        (encoder_weights.load_sentence_encoder, "modules.json"),
        (encoder_weights.load_classifier, "config.json"),
    ):
        with pytest.raises(UserError, match=f"{file}: no such file"):
            load(tmp_path)
    directory = copy_of("bert_sentence", tmp_path)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for keep in (0, 5, 40, -1):
        weights.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
            encoder_weights.load_sentence_encoder(directory)
    weights.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin.*SentenceTransformer\(DIR\)\.save_pretrained"):
        encoder_weights.load_sentence_encoder(directory)
    weights.write_bytes(whole)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        encoder_weights.load_sentence_encoder(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        encoder_weights.load_sentence_encoder(directory)
    directory = copy_of("roberta_classifier", tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin.*AutoModelForSequenceClassification"):
        encoder_weights.load_classifier(directory)
