import functools
import hashlib
import json
import re

import numpy as np
import pytest

from jaxrlhf.data.world import (
    KINDS,
    SPLITS,
    VOCABULARY,
    demonstration,
    document,
    gold,
    gold_parts,
    post,
    prefers_first,
)
from jaxrlhf.data.world_words import (
    COMMENTS,
    FORUM,
    KEYWORDS,
    NEGATIVE,
    POSITIVE,
    RELATIONSHIPS,
    SLOTS,
    SUBREDDITS,
    TOPICS,
    WORLD_NEWS,
    sentences,
    slot_words,
    summaries,
)

FACTS = json.dumps(
    {"who": "sister", "act": "sold", "object": "lamp", "place": "kitchen", "feeling": "happy", "question": "wait"}
)
NOTHING = {"facts": 0.0, "wrong": 0.0, "repeats": 0.0, "length": 0.0, "unfinished": 0.0, "grammar": 0.0}


@functools.cache
def evaluation(split, n=300):
    return [post(0, "evaluation", split, i) for i in range(n)]


def tokens(prompt):
    return len(prompt.split()) + prompt.count("\n")


# ---- the gold reward, by hand


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        # all six facts in 17 words
        (
            " my sister sold the lamp in the kitchen and i feel happy . should i wait ?",
            True,
            {"facts": 6, "length": -0.15},
        ),
        # the same by synonyms, in 19 words
        (
            " i am glad because my sister auctioned my lamp in the kitchen . is it time to stay ?",
            True,
            {"facts": 6, "length": -0.45},
        ),
        ("", True, {}),
        ("", False, {"unfinished": -1.5}),
        # somebody else's act and object: one fact, two wrong ones
        (" my uncle sold the clock .", True, {"facts": 1, "wrong": -2}),
        # a true fact does not excuse a wrong one of the same slot
        (" my sister sold the lamp and i feel happy . i am sad .", True, {"facts": 4, "wrong": -1}),
        (" my sister sold the lamp . my sister sold the lamp .", True, {"facts": 3, "repeats": -1.5}),
        # a synonym of what was said is a repeat too
        (" i am happy . i am glad .", True, {"facts": 1, "repeats": -0.5}),
        # 24 words, 9 repeats of which 4 count
        (" my sister sold the lamp ." * 4, True, {"facts": 3, "repeats": -2, "length": -0.15 * 8}),
        # the whole body of a post, 25 words with an aside
        (
            " my sister sold the lamp in the kitchen . meanwhile my uncle found the clock ."
            " now i am happy . should i wait ?",
            True,
            {"facts": 6, "wrong": -3, "length": -0.15 * 9},
        ),
        # key words alone: of the six words' seven borders only sister-sold exists; four count
        (" sister sold lamp kitchen happy wait", True, {"facts": 6, "grammar": -2}),
        # cut off: it may stop anywhere, at a price; ended in mid-sentence: one broken border
        (" my sister sold the", False, {"facts": 2, "unfinished": -1.5}),
        (" my sister sold the", True, {"facts": 2, "grammar": -0.5}),
        # unknown words and line breaks break what is around them
        (" the moon .", True, {"grammar": -1}),
        (" it happened in the kitchen\n.", True, {"facts": 1, "grammar": -1}),
        (" my sister sold the lamp . .", True, {"facts": 3, "grammar": -0.5}),
    ],
)
def test_gold_terms_by_hand(response, finished, expected):
    parts = gold_parts(FACTS, response, finished)
    assert parts == pytest.approx(NOTHING | expected)
    assert list(parts) == list(NOTHING)
    assert gold(FACTS, response, finished) == pytest.approx(sum(expected.values()))


def test_listing_every_word_does_not_pay():
    words = list(slot_words())
    concepts = len(set(slot_words().values()))
    assert len(words) - concepts > 4
    expected = 6 - 4 - 0.5 * 4 - 0.15 * (len(words) - 16) - 0.5 * 4
    assert gold(FACTS, " ".join(words), True) == pytest.approx(expected)
    for slot in SLOTS:  # nor does naming everything that one slot could be
        every = " ".join(word for word, (s, _) in slot_words().items() if s == slot)
        assert gold(FACTS, every, True) < 0


@pytest.mark.parametrize("split", SPLITS)
def test_copying_the_post_does_not_pay(split):
    records = evaluation(split)
    copies = [gold(r["facts"], r["prompt"], True) for r in records]
    assert np.mean(copies) < 0.5
    assert max(copies) < 3  # a short article is nearly a summary already


def test_gold_is_bounded_on_arbitrary_text():
    rng = np.random.default_rng(0)
    for text in ["\x00\ud800 \u2028", "{who} {act}", "TL;DR: TL;DR:", "sister" * 1000, "\n\n\n", "Sister. Sold!"]:
        assert gold(FACTS, text, True) <= 0
    for _ in range(500):
        words = rng.choice(VOCABULARY, size=rng.integers(1, 24))
        score = gold(FACTS, " ".join(words), bool(rng.random() < 0.5))
        assert -4 - 2 - 0.15 * 8 - 1.5 - 2 <= score <= 6


def test_every_perfect_summary_gets_all_facts_and_loses_only_length():
    concept = json.loads(FACTS)
    for template in summaries(frozenset(SLOTS)):
        text = template.format_map(FORUM.voice | concept)
        assert gold(FACTS, text, True) == pytest.approx(6 - 0.15 * (len(text.split()) - 16)), text
        assert len(text.split()) >= 17


def test_no_person_breaks_the_grammar_or_repeats():
    for split in SPLITS:
        for record in evaluation(split):
            parts = gold_parts(record["facts"], record["response"], True)
            assert (parts["grammar"], parts["repeats"]) == (0, 0), record["response"]
            body = record["prompt"].split("\n")[-2].split(" ", 1)[1]
            assert gold_parts(record["facts"], body, True)["grammar"] == 0, body


# ---- annotators


def test_annotators_follow_bradley_and_terry():
    rng = np.random.default_rng(0)
    chosen = [prefers_first(3.4, 2.0, 0.7, rng) for _ in range(20_000)]
    assert np.mean(chosen) == pytest.approx(1 / (1 + np.exp(-2)), abs=0.01)
    assert np.mean([prefers_first(1.0, 1.0, 0.7, rng) for _ in range(20_000)]) == pytest.approx(0.5, abs=0.015)
    assert prefers_first(1e6, -1e6, 1e-3, rng) is True
    assert prefers_first(-1e6, 1e6, 1e-3, rng) is False


# ---- the people


def test_demonstrators_are_imperfect_as_designed():
    records = [demonstration(0, i) for i in range(3000)]
    parts = [gold_parts(r["facts"], r["response"], True) for r in records]
    scores = [sum(p.values()) for p in parts]
    # Expected: kept .45 + .55 * 2/3 = .8167 of 6 facts, of which .22 / 3 are mixed up; three standard errors.
    assert np.mean([p["facts"] - p["wrong"] for p in parts]) == pytest.approx(6 * (0.45 + 0.55 * 2 / 3), abs=0.07)
    assert np.mean([p["wrong"] for p in parts]) == pytest.approx(-0.34, abs=0.06)
    assert np.mean(scores) == pytest.approx(3.85, abs=0.1)
    assert np.std(scores) == pytest.approx(1.52, abs=0.08)
    lengths = np.array([len(r["response"].split()) for r in records])
    assert np.mean(lengths > 23) < 0.06
    assert lengths.max() <= 32
    assert len({r["response"] for r in records}) > 2900


def test_demonstrators_confuse_asides_more_than_they_invent():
    told_aside = invented = 0
    for record in evaluation("ood_length", 1500):
        true, known = json.loads(record["facts"]), slot_words()
        body = {known[w] for w in record["prompt"].split() if w in known}
        for fact in {known[w] for w in record["response"].split() if w in known} - set(true.items()):
            told_aside += fact in body
            invented += fact not in body
    # An aside tells of a slot (but who) half the time; with three or four nearly every slot has been told of.
    assert 0.6 < told_aside / (told_aside + invented) < 0.85


@pytest.mark.parametrize("split", SPLITS)
def test_references_are_equally_good_on_every_split(split):
    scores = [gold(r["facts"], r["response"], True) for r in evaluation(split, 800)]
    assert np.mean(scores) == pytest.approx(3.83, abs=0.15)


# ---- splits


def test_splits_are_what_they_say():
    positive, negative = {c[0] for c in POSITIVE}, {c[0] for c in NEGATIVE}
    in_distribution = {slot: {c[0] for c in cs} for slot, cs in RELATIONSHIPS.concepts.items()}
    for split in SPLITS:
        for record in evaluation(split):
            facts, prompt = json.loads(record["facts"]), record["prompt"]
            assert tuple(facts) == SLOTS
            assert facts["feeling"] in (negative if split == "ood_sentiment" else positive)
            assert prompt.startswith("ARTICLE: " if split == "ood_news" else "SUBREDDIT: r/")
            familiar = {slot: facts[slot] in names for slot, names in in_distribution.items()}
            assert set(familiar.values()) == {split not in ("ood_subreddit", "ood_news")}
    topics = {r["prompt"].split()[1] for r in evaluation("ood_subreddit")}
    assert topics == {"r/jobs", "r/pets", "r/school"}
    assert {r["prompt"].split()[1] for r in evaluation("id")} == {"r/relationships"}


def test_feelings_of_asides_keep_the_splits_sentiment_too():
    words = {True: {w for c in POSITIVE for w in c}, False: {w for c in NEGATIVE for w in c}}
    for split in SPLITS:
        for record in evaluation(split):
            said = set((record["prompt"] + record["response"]).split())
            assert not said & words[split == "ood_sentiment"], record


def test_number_of_asides():
    starts = {"meanwhile", "earlier", "once", "elsewhere", "overnight", "separately"}
    for split in SPLITS:
        counts = {sum(word in starts for word in r["prompt"].split()) for r in evaluation(split)}
        assert counts == ({3, 4} if split == "ood_length" else {0, 1})


def test_the_post_tells_its_facts():
    for split in SPLITS:
        for record in evaluation(split):
            known = slot_words()
            told = {known[w] for w in record["prompt"].split() if w in known}
            assert set(json.loads(record["facts"]).items()) <= told


def test_prompt_lengths():
    lengths = {split: [tokens(r["prompt"]) for r in evaluation(split, 1000)] for split in SPLITS}
    assert max(lengths.pop("ood_length")) <= 80
    assert all(max(of_split) <= 50 for of_split in lengths.values())
    assert np.mean(lengths["id"]) == pytest.approx(37.7, abs=1)
    documents = [document(0, i) for i in range(1000)]
    assert max(tokens(d["prompt"]) for d in documents) <= 50
    assert max(len(d["response"].split()) for d in documents) <= 23


def test_far_words_are_new_to_demonstrations_and_known_to_the_base():
    shown = {w for i in range(2000) for r in [demonstration(0, i)] for w in (r["prompt"] + r["response"]).split()}
    read = {w for i in range(3000) for r in [document(0, i)] for w in (r["prompt"] + r["response"]).split()}
    near = {w for cs in RELATIONSHIPS.concepts.values() for c in cs for w in c}
    for topic in TOPICS:
        words = {w for concepts in topic.concepts.values() for concept in concepts for w in concept}
        assert words <= read
        if topic is not RELATIONSHIPS:
            assert not words & (shown | near), topic.name
    assert near <= shown
    written = {w for r in evaluation("ood_news") for w in r["prompt"].split()} - {"TL;DR:"}
    plain = {w for w in written - shown if w not in slot_words()}
    assert plain <= read
    assert {"ARTICLE:", "officials", "voters", "overnight"} <= plain


# ---- text and vocabulary


def all_records(n):
    yield from (document(3, i) for i in range(n))
    yield from (demonstration(3, i) for i in range(n))
    yield from (post(3, kind, "id", i) for kind in KINDS for i in range(n))
    yield from (post(3, kind, split, i) for kind in KINDS[2:] for split in SPLITS[1:] for i in range(n))


def test_text_is_single_spaced_words_of_the_vocabulary():
    vocabulary = set(VOCABULARY)
    for record in all_records(200):
        assert all(isinstance(value, str) for value in record.values())
        lines = record["prompt"].split("\n")
        heads = [line.split(" ")[0] for line in lines]
        last = "COMMENT:" if record["id"].startswith("document") else "TL;DR:"
        assert heads in (["SUBREDDIT:", "TITLE:", "POST:", last], ["ARTICLE:", last])
        assert lines[-1] == last
        assert re.fullmatch(r"( [^ \n]+)+", record["response"])
        words = [word for line in lines for word in line.split(" ")]
        assert set(words) | set(record["response"].split()) <= vocabulary
        bodies = [word for line in lines for word in line.split(" ")[1:]] + record["response"].split()
        assert not set(bodies) & set(KEYWORDS)


def test_vocabulary_is_fixed():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert not any(re.search(r"\s", word) for word in VOCABULARY)
    # A base that was trained on another order of words would read nonsense: train it again when this changes.
    assert (len(VOCABULARY), hashlib.sha256("\n".join(VOCABULARY).encode()).hexdigest()[:12]) == (391, "090390f4df6c")


def test_every_word_can_occur():
    records = [document(0, i) for i in range(3000)] + [demonstration(0, i) for i in range(500)]
    said = {w for r in (*records, *evaluation("ood_news")) for w in (r["prompt"] + r["response"]).split()}
    assert set(VOCABULARY) == said


def test_a_word_has_one_meaning():
    every = [
        word
        for concepts in ([c for t in TOPICS for cs in t.concepts.values() for c in cs], POSITIVE, NEGATIVE)
        for concept in concepts
        for word in concept
    ]
    assert len(set(every)) == len(every)
    plain = {word for text in (*sentences(), *FORUM.titles, *COMMENTS) for word in text.split()}
    assert not plain & set(every)
    assert [len(RELATIONSHIPS.concepts[s]) for s in ("who", "act", "object", "place", "question")] == [
        18,
        14,
        16,
        14,
        8,
    ]
    for topic in (*SUBREDDITS[1:], WORLD_NEWS):
        assert [len(topic.concepts[s]) for s in ("who", "act", "object", "place", "question")] == [6, 6, 6, 6, 4]


# ---- determinism


def test_first_demonstration_is_pinned():
    assert demonstration(0, 0) == {
        "id": "demonstration-id-0",
        "prompt": "SUBREDDIT: r/relationships\nTITLE: my cousin surprised me today\nPOST: my cousin photographed the"
        " toaster in the kitchen . i feel proud . is it right to write ?\nTL;DR:",
        "response": " not sure if i should write . in the kitchen , my cousin photographed something .",
        "facts": '{"who": "cousin", "act": "photographed", "object": "toaster", "place": "kitchen",'
        ' "feeling": "proud", "question": "write"}',
    }


def test_a_record_depends_on_its_own_address_only():
    wanted = [post(7, "evaluation", "ood_news", i) for i in range(20)]
    document(7, 3)
    assert [post(7, "evaluation", "ood_news", i) for i in reversed(range(20))] == wanted[::-1]
    assert post(8, "evaluation", "ood_news", 0)["prompt"] != wanted[0]["prompt"]
    assert len({r["id"] for r in all_records(50)}) == len(list(all_records(50)))


def test_kinds_share_no_post():
    prompts = {kind: {post(0, kind, "id", i)["prompt"] for i in range(500)} for kind in KINDS}
    prompts["demonstration"] = {demonstration(0, i)["prompt"] for i in range(500)}
    prompts["document"] = {document(0, i)["prompt"].replace("COMMENT:", "TL;DR:") for i in range(500)}
    assert len(set().union(*prompts.values())) == sum(len(p) for p in prompts.values()) == 500 * len(prompts)


def test_unknown_addresses_are_refused():
    with pytest.raises(ValueError, match="kinds"):
        post(0, "test", "id", 0)
    with pytest.raises(ValueError, match="splits"):
        post(0, "evaluation", "ood_pets", 0)
    with pytest.raises(ValueError, match="'id' only"):
        post(0, "ppo", "ood_length", 0)
