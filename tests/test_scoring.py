from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import policies, scoring, weights
from jaxrlhf.data import batches, tokens
from jaxrlhf.files import UserError
from jaxrlhf.split import split
from jaxrlhf.types import ScalarHead, Scorer

HF = Path(__file__).parent / "golden" / "hf"
FAMILIES = tuple(sorted(p.name for p in HF.iterdir()))
WORDS = ["Q:", "A:", "red", "blue", "one", "two", "."]
OURS, OTHER = tokens.word_tokenizer(WORDS), tokens.word_tokenizer(["more", *reversed(WORDS)])
PROMPTS = ["Q: red one\nA:", "Q: two\nA:", "Q: blue . two\nA:"]
RESPONSES = [" blue .", " red", " one two two ."]


def exported(folder, name="llama_tied", tokenizer=OURS, bias=0.25):
    """A reward model of random weights: its architecture, parameters and head."""
    arch, params = weights.load(HF / name)
    w_D = np.random.default_rng(1).normal(0, 0.3, arch.width).astype(np.float32)
    head = ScalarHead(w_D=jnp.asarray(w_D), b=jnp.float32(bias))
    folder.mkdir()
    tokens.save_files(tokenizer, folder, "right")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    weights.export_reward(folder, arch, params, head, special)
    return arch, params, head


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_comes_back(name, tmp_path):
    """Scores, not bytes: the bias may have gone into the final norm, and OPT-350m's read-out into its projection."""
    arch, params, head = exported(tmp_path / "x", name)
    again_arch, again, again_head = weights.load_reward(tmp_path / "x")
    assert again_arch == arch
    assert again["lm_head"] == {}
    tokens_BT, mask_BT = (jnp.asarray(x) for x in batches.pad([[5, 9, 3, 1], [7, 1]], 6, 0))
    scores = []
    for tree, h in ((params, head), (again, again_head)):
        frozen, top = split(tree, 0)
        scores.append(policies.score(arch, frozen, Scorer(top=top, head=h), tokens_BT, mask_BT))
    assert np.abs(scores[0] - scores[1]).max() < 1e-5
    assert np.ptp(scores[0]) > 1e-3


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tensor score\.weight"):
        weights.load_reward(HF / "opt")
    exported(tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        scoring.load(tmp_path / "x")


@pytest.mark.parametrize("tokenizer", [OURS, OTHER], ids=["same", "other"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_scores_are_those_of_transformers(tmp_path, tokenizer, name):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    exported(tmp_path / "x", name, tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "x")
    finished = [True, False, True]
    rows = [reader(p + r)["input_ids"] + [1] * f for p, r, f in zip(PROMPTS, RESPONSES, finished, strict=True)]
    inputs = reader.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(**inputs).logits[:, 0].numpy() + theirs.config.jaxrlhf_score_bias
    reward = scoring.load(tmp_path / "x")
    assert np.abs(scoring.score_texts(reward, PROMPTS, RESPONSES, finished, batch_size=2) - wanted).max() < 1e-4
    drawn = [q + [1] * f for q, f in zip(OURS.encode_many(RESPONSES), finished, strict=True)]
    assert np.abs(scoring.score_ids(reward, OURS, OURS.encode_prompts(PROMPTS), drawn) - wanted).max() < 1e-4
    assert np.abs(np.diff(wanted)).min() > 1e-3


def test_which_tokenizers_share_ids():
    larger = tokens.word_tokenizer([*WORDS, "more"])
    assert scoring.same_ids(OURS, OURS)
    assert scoring.same_ids(OURS, larger)
    assert not scoring.same_ids(larger, OURS)
    assert not scoring.same_ids(OURS, OTHER)
    assert not scoring.same_ids(OURS, tokens.Tokenizer(OURS.engine, bos=(1,)))


def test_an_unfinished_answer_does_not_look_finished(tmp_path):
    exported(tmp_path / "x")
    reward = scoring.load(tmp_path / "x")
    scores = [scoring.score_texts(reward, PROMPTS[:1], RESPONSES[:1], [f])[0] for f in (True, False)]
    assert abs(scores[0] - scores[1]) > 1e-3
    assert scoring.score_texts(reward, [], []).shape == (0,)


def test_texts_that_have_no_positions_are_named(tmp_path):
    exported(tmp_path / "x", "gpt2")
    with pytest.raises(UserError, match="text 2 has 32 tokens; the reward model reads 24"):
        scoring.score_texts(scoring.load(tmp_path / "x"), PROMPTS[:2], [" red", " red" * 27])
