import pytest

from jaxrlhf.data import tokens, world


@pytest.fixture(scope="module")
def words():
    return tokens.word_tokenizer(world.VOCABULARY)


@pytest.fixture(scope="module")
def bpe():
    return tokens.bpe_tokenizer(["the cat sat on the mat", "naïve café 日本語 🙂", "<eos> is a word here"] * 5, 400)


@pytest.mark.parametrize("split", world.SPLITS)
def test_the_world_round_trips_and_joined_text_is_joined_tokens(words, split):
    for i in range(40):
        r = world.post(7, "evaluation", split, i)
        prompt, response = words.encode(r["prompt"]), words.encode(r["response"])
        assert words.encode(r["prompt"] + r["response"]) == prompt + response
        assert words.decode([*prompt, *response, words.eos_id, words.pad_id]) == r["prompt"] + r["response"]
        assert words.engine.token_to_id("<unk>") not in prompt + response


@pytest.mark.parametrize(
    "text", ["the cat", " leading  and trailing ", "日本語\n\tعربى 🙂\x00", "<eos><pad>", "", "naïve{}"]
)
def test_bytes_round_trip_in_any_script(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_text_that_spells_a_special_token_is_text(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    for tokenizer in (bpe, tokens.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode("so <eos> it <pad> ends")
        assert tokenizer.eos_id not in ids
        assert tokenizer.pad_id not in ids
        assert tokenizer.decode(ids) == "so <eos> it <pad> ends"


def test_learning_is_deterministic():
    texts = ["abra cadabra", "abracadabra abba"] * 3
    a, b = tokens.bpe_tokenizer(texts, 300), tokens.bpe_tokenizer(texts, 300)
    assert a.engine.to_str() == b.engine.to_str()
