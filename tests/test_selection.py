import dataclasses
import itertools
import json

import pytest

from jaxrlhf.config import Evaluation, Experiment
from jaxrlhf.config_data import Datasets, Source
from jaxrlhf.data import selection, sentiment, task
from jaxrlhf.files import UserError, read_json

NAMES = ("tifu", "relationships")


def text(i, count=12):
    """A post that shares no word with another."""
    return " ".join(f"word{i}x{j}" for j in range(count))


def post(i, count=12, **changes):
    made = {"id": f"t3_{i}", "subreddit": NAMES[i % 2], "title": f"t{i}", "post": text(i, count), "summary": f"s{i}"}
    return made | changes


def pair(i, split="train", **changes):
    info = {k: v for k, v in post(i, **changes).items() if k != "summary"}
    sides = [{"text": f" good{i}"}, {"text": f" bad{i}"}]
    return {"info": info, "summaries": sides, "choice": 0, "split": split}


def write(folder, name, records):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def c(tmp_path):
    write(tmp_path / "tldr", "train", [post(i) for i in range(40)])
    write(tmp_path / "tldr", "validation", [post(i) for i in range(40, 50)])
    write(tmp_path / "tldr", "test", [post(i) for i in range(50, 70)])
    write(
        tmp_path / "pairs",
        "batch",
        [
            *(pair(i) for i in (*range(30), *range(30), 200, 201)),
            *(pair(i, "valid2") for i in range(60, 80)),
            {**pair(0, "valid1"), "info": {"id": "n", "site": "cnn", "title": "", "article": "a far article"}},
        ],
    )
    write(tmp_path / "cnn", "test", [{"id": f"c{i}", "article": text(i, 30), "highlights": "h"} for i in range(90, 97)])
    return Datasets(
        sft="tldr",
        preferences="tldr_comparisons",
        far=("cnn_dailymail",),
        evaluation_prompts=0,
        tldr=Source(path=str(tmp_path / "tldr")),
        tldr_comparisons=Source(path=str(tmp_path / "pairs")),
        cnn_dailymail=Source(path=str(tmp_path / "cnn")),
    )


def select(c, tmp_path, seed=0, log=lambda said: None):
    return selection.select(c, seed, None, tmp_path / "run", log)


def prompts(records):
    return [r["prompt"] for r in records]


def told(i):
    return f"SUBREDDIT: r/{NAMES[i % 2]}\nTITLE: t{i}\nPOST: {text(i)}\nTL;DR:"


def test_full_by_hand(c, tmp_path):
    found = select(c, tmp_path)
    assert list(found.demonstrations) == [
        {"id": f"tldr-train-{i}", "prompt": told(i), "response": f" s{i}"} for i in range(40)
    ]
    assert prompts(found.validation) == [told(i) for i in range(40, 50)]
    assert prompts(found.ppo_prompts) == [told(i) for i in range(40)]
    assert list(found.splits) == ["id", "ood_cnn_dailymail"]
    assert prompts(found.splits["id"]) == [told(i) for i in range(50, 70)]
    assert found.splits["ood_cnn_dailymail"][1] == {
        "id": "cnn_dailymail-test-1",
        "prompt": f"ARTICLE: {text(91, 30)}\nTL;DR:",
        "response": " h",
    }
    assert list(found.preferences) == ["train", "id", "ood_cnn_dailymail"]
    assert found.preferences["id"][0] == {
        "id": "tldr_comparisons-test-0",
        "prompt": told(60),
        "chosen": " good60",
        "rejected": " bad60",
        "chosen_finished": "1",
        "rejected_finished": "1",
    }
    assert prompts(found.preferences["ood_cnn_dailymail"]) == ["ARTICLE: a far article\nTL;DR:"]
    assert len(found.preferences["train"]) == 62
    assert found.demonstrations[-1]["id"] == "tldr-train-39"
    assert found.demonstrations[3:9:2] == [found.demonstrations[i] for i in (3, 5, 7)]
    with pytest.raises(IndexError):
        found.demonstrations[40]


def parts(c, tmp_path, inside, kind):
    """Each part against a rule on posts."""
    found = select(c, tmp_path)
    assert list(found.splits) == ["id", f"ood_{kind}", "full", "ood_cnn_dailymail"]
    for records, among in (
        (found.demonstrations, range(40)),
        (found.validation, range(40, 50)),
        (found.ppo_prompts, range(40)),
        (found.splits["id"], range(50, 70)),
        (found.preferences["id"], range(60, 80)),
    ):
        assert prompts(records) == [told(i) for i in among if inside(i)]
    assert prompts(found.splits[f"ood_{kind}"]) == [told(i) for i in range(50, 70) if not inside(i)]
    assert prompts(found.splits["full"]) == [told(i) for i in range(50, 70)]
    assert prompts(found.preferences[f"ood_{kind}"]) == [told(i) for i in range(60, 80) if not inside(i)]
    assert len(found.preferences["train"]) == sum(inside(i) for i in (*range(30), *range(30), 200, 201))


def test_by_subreddit(c, tmp_path):
    c = dataclasses.replace(c, split="subreddit", subreddits=("tifu",), full_test=True)
    parts(c, tmp_path, lambda i: i % 2 == 0, "subreddit")


def test_by_a_users_sentiment_index(c, tmp_path):
    path = tmp_path / "index.json"
    sentiment.write(path, {f"t3_{i}": i % 3 == 0 for i in range(202)}, 0)
    c = dataclasses.replace(c, split="sentiment", sentiment_index=str(path), full_test=True)
    parts(c, tmp_path, lambda i: i % 3 == 0, "sentiment")
    sentiment.write(path, {f"t3_{i}": i % 3 == 0 for i in range(201)}, 0)
    with pytest.raises(UserError, match="no label for the record 't3_201'"):
        select(c, tmp_path)


def test_our_own_index_says_the_same_again(c, tmp_path):
    glad = [post(i, post=f"{text(i)} {'glad' if i % 4 else 'sad'}") for i in range(70)]
    for name, a, b in (("train", 0, 40), ("validation", 40, 50), ("test", 50, 70)):
        write(tmp_path / "tldr", name, glad[a:b])
    write(tmp_path / "pairs", "batch", [pair(i, post=glad[i]["post"]) for i in range(20)])
    c = dataclasses.replace(c, split="sentiment")
    found = select(c, tmp_path)
    assert len(found.demonstrations) == 30
    assert all("sad" not in r["prompt"] for r in (*found.demonstrations, *found.splits["id"]))
    assert all("sad" in r["prompt"] for r in found.splits["ood_sentiment"])
    again = dataclasses.replace(c, sentiment_index=str(tmp_path / "run" / "data" / "sentiment.json"))
    assert list(select(again, tmp_path / "other").splits["id"]) == list(found.splits["id"])


def test_by_length(c, tmp_path):
    write(tmp_path / "tldr", "test", [post(i, 10 + i % 5) for i in range(50, 70)])
    c = dataclasses.replace(c, split="length", length=12)
    found = select(c, tmp_path)
    assert [len(found.splits[s]) for s in ("id", "ood_length")] == [12, 8]


def test_what_training_has_leaves_the_tests(c, tmp_path):
    """The same post under another title, nearly the same one, and one that merely shares a part."""
    near = text(201, 60)
    changed = " ".join([*near.split()[:-2], "other", "end"])  # 53 eights each, 51 of them shared
    write(
        tmp_path / "tldr",
        "test",
        [
            post(300, post=text(3).upper() + "!", title="another"),
            post(301, post=changed),
            post(302, post=" ".join(near.split()[:30])),
            post(303),
        ],
    )
    write(tmp_path / "tldr", "train", [*(post(i) for i in range(40)), post(201, post=near)])
    write(tmp_path / "tldr", "validation", [post(303, title="in the test set"), post(5), post(305)])
    write(tmp_path / "cnn", "test", [{"id": f"c{i}", "article": text(i), "highlights": "h"} for i in (7, 303, 400)])
    found, said = select(c, tmp_path), []
    assert [r["id"] for r in found.splits["id"]] == ["tldr-test-2", "tldr-test-3"]
    assert [r["id"] for r in found.validation] == ["tldr-validation-2"]
    assert [r["id"] for r in found.splits["ood_cnn_dailymail"]] == ["cnn_dailymail-test-2"]
    assert {k: n for k, n in found.notes.items() if "removed" in k} == {
        "test_records_same_as_training_removed": 1,
        "test_records_near_as_training_removed": 1,
        "far_cnn_dailymail_records_same_as_training_removed": 1,
        "far_cnn_dailymail_records_same_as_test_removed": 1,
        "validation_records_same_as_test_removed": 1,
        "validation_records_same_as_training_removed": 1,
    }
    told = [json.loads(line) for line in (tmp_path / "run" / "data" / "near_duplicates.jsonl").open()]
    assert told[0] == {"in": "test", "id": "t3_300", "of": "t3_3", "similarity": 1.0}
    assert told[1] == {"in": "test", "id": "t3_301", "of": "t3_201", "similarity": round(51 / 55, 4)}
    # whatever a run trains on, its test set is the same
    part = dataclasses.replace(c, subset=0.1, split="subreddit", full_test=True)
    fewer = select(part, tmp_path)
    assert prompts(fewer.splits["full"]) == prompts(found.splits["id"])
    select(part, tmp_path, log=said.append)
    assert "1 test records near as training removed" in said[-1]


def test_no_post_is_in_two_splits(c, tmp_path):
    for changes in ({}, {"split": "subreddit"}, {"subset": 0.5}):
        found = select(dataclasses.replace(c, **changes), tmp_path)
        groups = [found.demonstrations, found.validation, *found.splits.values()]
        for a, b in itertools.combinations(groups, 2):
            assert not set(prompts(a)) & set(prompts(b))
        trained = {*prompts(found.demonstrations), *prompts(found.preferences["train"]), *prompts(found.ppo_prompts)}
        for name, records in (*found.splits.items(), *found.preferences.items()):
            assert name == "train" or not trained & set(prompts(records))


def test_subsets_and_limits(c, tmp_path):
    found = select(dataclasses.replace(c, subset=0.25, evaluation_prompts=3, evaluation_pairs=4), tmp_path)
    assert [len(x) for x in (found.demonstrations, found.ppo_prompts, found.preferences["train"])] == [10, 10, 16]
    assert [len(r) for r in found.splits.values()] == [3, 3]
    assert len(found.preferences["id"]) == 4
    assert prompts(found.demonstrations) != [told(i) for i in range(10)]
    assert len(found.validation) == 10


def test_held_out_where_a_dataset_has_no_test(tmp_path):
    """Pairs and demonstrations of the same questions fall on the same sides."""
    records = [{"q": text(i), "a": f"a{i}", "good": "x", "bad": "y"} for i in range(400)]
    write(tmp_path / "mine", "all", records)
    path = str(tmp_path / "mine" / "all.jsonl")
    c = Datasets(
        sft="own",
        preferences="own_pairs",
        prompt="Q: {question}\nA:",
        held_out=0.1,
        evaluation_prompts=0,
        own=Source(path=path, fields=("question=q", "response=a")),
        own_pairs=Source(path=path, fields=("question=q", "chosen=good", "rejected=bad")),
    )
    found = select(c, tmp_path)
    sides = [found.demonstrations, found.splits["id"], found.validation]
    assert sum(map(len, sides)) == 400
    assert all(20 < len(side) < 60 for side in sides[1:])
    assert prompts(found.preferences["train"]) == prompts(found.demonstrations)
    assert prompts(found.preferences["id"]) == prompts(found.splits["id"])
    assert found.demonstrations[0]["prompt"].startswith("Q: word")
    other = select(c, tmp_path, seed=1)
    assert prompts(other.splits["id"]) != prompts(found.splits["id"])


def test_kept_for_the_next_call(c, tmp_path, monkeypatch):
    first = select(c, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(selection, "_plan", lambda *args: pytest.fail("planned again"))
        again = select(c, tmp_path)
    assert list(again.splits["id"]) == list(first.splits["id"])
    assert list(again.preferences["train"]) == list(first.preferences["train"])
    assert (again.notes, again.mark) == (first.notes, first.mark)
    write(tmp_path / "tldr", "train", [post(i) for i in range(1, 40)])
    assert len(select(c, tmp_path).demonstrations) == 39


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sft": "tldrr"}, r"config\.datasets\.sft='tldrr': known are tldr, "),
        ({"sft": ""}, r"config\.datasets\.sft='': known are"),
        ({"far": ("cnn",)}, r"config\.datasets\.far\[0\]='cnn': known are"),
        ({"preferences": "tldr"}, r"preferences='tldr': of pairs are tldr_comparisons"),
        ({"sft": "own"}, r"config\.datasets\.prompt is empty"),
        ({"preferences": "hh"}, r"prompt asks for \{post\}; hh has prompt"),
        ({"prompt": "{title} {flair}"}, r"prompt asks for \{flair\}; \w+ has subreddit, title, post"),
        ({"prompt": "tdlr"}, r"config\.datasets\.prompt='tdlr': known are"),
        ({"split": "topic"}, r"split='topic': known are full"),
        ({"subset": 2.0}, r"subset=2\.0"),
        ({"held_out": 0.0}, r"held_out=0\.0: must be from"),
        ({"near_duplicate": float("nan")}, r"near_duplicate=nan: must be from"),
        ({"sentiment_index": "x"}, r"sentiment_index is for split=sentiment"),
        ({"split": "sentiment", "sentiment_index": "nowhere.json"}, r"nowhere\.json: no such file"),
        ({"split": "subreddit", "subreddits": ("pics",)}, r"the part 'train' .* has no record"),
        ({"split": "length", "length": 999}, r"the part 'test_ood_length' .* has no record"),
    ],
)
def test_bad_keys_are_named(c, tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        select(dataclasses.replace(c, **changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_datasets_as_a_task(c, tmp_path):
    config = Experiment(
        task="datasets", datasets=dataclasses.replace(c, vocab_size=300), evaluation=Evaluation(judge="reward")
    )
    made = task.load(config, tmp_path / "run", lambda said: None)
    found = select(config.datasets, tmp_path)
    assert list(made.demonstrations) == list(found.demonstrations)
    assert list(made.documents()) == list(found.demonstrations)
    assert made.preferences is not None
    assert list(made.preferences["train"]) == list(found.preferences["train"])
    assert list(made.splits) == ["id", "ood_cnn_dailymail"]
    assert (made.gold, list(made.preference_prompts)) == (None, [])
    assert read_json(tmp_path / "run" / "data" / "notes.json") == found.notes
    assert made.tokenizer.decode(made.tokenizer.encode(told(3))) == told(3)
