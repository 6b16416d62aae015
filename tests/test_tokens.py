import subprocess
import sys

import pytest

from jaxrlhf.data import tokens, world
from jaxrlhf.files import UserError

POST = "SUBREDDIT: r/relationships\nTITLE: my sister sold the lamp\nPOST: my sister sold the lamp .\nTL;DR:"
TEXTS = ["Write a story about a fox.\n\nOnce there was a fox <eos> and a story about it.", "naïve café, ünd so weiter"]
STRANGE = [
    "",
    " ",
    "a  b\t\tc \n\n\r\nd ",
    "日本語 العربية हिन्दी 👩‍👩‍👧‍👦",
    "\x00\x07\x7f\u200b\u2028\ufeff",
    "▁metaspace▁",
    "def f(x):\n    return {x: '{instruction}'}",
    "<eos>",
    "a<pad> <eos>b</s>",
]


@pytest.fixture(scope="module")
def words():
    return tokens.word_tokenizer(world.VOCABULARY)


@pytest.fixture(scope="module")
def bpe():
    return tokens.bpe_tokenizer(TEXTS, 300)


def test_words_by_hand():
    tokenizer = tokens.word_tokenizer(["TITLE:", "TL;DR:", "my", "lamp", ".", ":"])
    # 0 <pad>, 1 <eos>, 2 <unk>, 3 newline, then the words in order
    assert tokenizer.encode("TITLE: my lamp .\nTL;DR:") == [4, 6, 7, 8, 3, 5]
    assert tokenizer.encode(" my lamp : .") == [6, 7, 9, 8]
    assert tokenizer.encode(" my dragon") == [6, 2]
    assert tokenizer.decode([0, 0, 4, 6, 7, 8, 3, 5, 6, 1, 0]) == "TITLE: my lamp .\nTL;DR: my"
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.eos_id) == (10, 0, 1)


def test_words_round_trip_and_join(words):
    response = " my sister sold the lamp ."
    assert words.encode(POST + response) == words.encode(POST) + words.encode(response)
    for i in range(30):
        posts = [world.post(3, "evaluation", split, i) for split in world.SPLITS]
        for record in (world.document(3, i), world.demonstration(3, i), *posts):
            prompt, response = record["prompt"], record["response"]
            ids = words.encode(prompt + response)
            assert ids == words.encode(prompt) + words.encode(response)
            assert words.decode(ids) == prompt + response
            assert min(ids) > 2  # no special token, nothing unknown
            assert len(ids) == len((prompt + response).split()) + prompt.count("\n")


def test_the_base_was_trained_with_these_ids(words):
    assert words.size == len(world.VOCABULARY) + 4
    assert [words.encode(t) for t in ("\n", "TL;DR:")] == [[3], [4 + list(world.VOCABULARY).index("TL;DR:")]]


@pytest.mark.parametrize("text", ["<eos>", " <eos>", "<pad>\n<eos> <pad>", "TITLE:<eos>"])
def test_no_text_spells_a_special_token(words, bpe, text):
    for tokenizer in (words, bpe):
        for ids in (tokenizer.encode(text), *tokenizer.encode_many([text])):
            assert ids
            assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.pad_id, *bpe.encode(text), bpe.eos_id, bpe.pad_id]) == text


def test_bpe_learns_within_its_size(bpe):
    assert 258 < bpe.size <= 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 1.3
    assert tokens.bpe_tokenizer([], 10).size == 258  # every byte and two special tokens, whatever is asked


def test_many_at_once_are_the_same_ids(bpe, words):
    for tokenizer in (bpe, words):
        assert tokenizer.encode_many(STRANGE) == [tokenizer.encode(t) for t in STRANGE]
    assert bpe.encode_many([]) == []


def test_saved_and_loaded(tmp_path, bpe, words):
    for tokenizer in (bpe, words):
        path = tmp_path / "deep" / "tokenizer.json"
        tokenizer.save(path)
        loaded = tokens.load(path)
        for text in [*STRANGE, POST]:
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert loaded.size == tokenizer.size


def test_learning_is_deterministic_across_processes(bpe):
    code = (
        "from jaxrlhf.data import tokens; import hashlib; "
        f"print(hashlib.sha256(tokens.bpe_tokenizer({TEXTS!r}, 300).engine.to_str().encode()).hexdigest())"
    )
    found = set()
    for parallel in ("true", "false"):
        env = {"TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        tokens.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer"):
        tokens.load(tmp_path / "bad.json")
