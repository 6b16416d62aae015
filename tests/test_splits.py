from dataclasses import replace

import pytest

from jaxrlhf.config_data import Datasets
from jaxrlhf.data import sentiment, splits
from jaxrlhf.files import UserError

C = Datasets()


def test_by_subreddit():
    c = replace(C, split="subreddit", subreddits=("tifu", "AskReddit"))
    inside = splits.in_distribution(c)
    assert [inside({"subreddit": s}) for s in ("tifu", "askreddit", "AskReddit", "relationships")] == [1, 0, 1, 0]
    with pytest.raises(UserError, match="no field 'subreddit'"):
        inside({"article": "x"})


def test_by_length_as_the_paper_counts():
    """What single spaces part: two spaces count one more, a line break none."""
    inside = splits.in_distribution(replace(C, split="length"))
    assert inside({"post": " ".join(["w"] * 245), "title": "not counted"})
    assert not inside({"post": " ".join(["w"] * 246)})
    assert not inside({"post": "w  " + " ".join(["w"] * 244)})
    assert inside({"post": " ".join(["w\nv"] * 245)})


def test_by_label():
    inside = splits.in_distribution(replace(C, split="sentiment"), {"a": True, "b": False})
    assert (inside({"id": "a"}), inside({"id": "b"})) == (True, False)
    with pytest.raises(UserError, match="no label for the record 'c'"):
        inside({"id": "c"})
    with pytest.raises(UserError, match="split='topic': known are full, subreddit"):
        splits.in_distribution(replace(C, split="topic"))


def test_random_subsets_are_exact_nested_and_seeded():
    tenth, half = splits.subset(1003, 0.1, 7), splits.subset(1003, 0.5, 7)
    assert (len(tenth), len(half)) == (100, 502)
    assert set(tenth) < set(half)
    assert half == sorted(set(half))
    assert tenth != splits.subset(1003, 0.1, 8)
    assert splits.subset(5, 1.0, 0) == [0, 1, 2, 3, 4]
    assert len(splits.subset(3, 0.1, 0)) == 1
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="a share above 0"):
            splits.subset(10, share, 0)


def test_the_released_codes_subsets_repeat_records():
    """PROTOCOL D28, measured on the released code: 9.52 % and 39.28 % of 116 722 are there at all."""
    for share, unique in ((0.1, 9.52), (0.5, 39.28)):
        drawn = splits.subset(116_722, share, 3, with_replacement=True)
        assert len(drawn) == 116_722 * share // 1
        assert round(100 * len(set(drawn)) / 116_722, 2) == unique
        assert drawn == splits.subset(116_722, share, 4, with_replacement=True)  # its seeds are its own
    with pytest.raises(UserError, match=r"subset=0\.2: with replacement"):
        splits.subset(100, 0.2, 0, with_replacement=True)


def test_held_out_records_depend_on_what_they_are_about_alone():
    keys = [f"post {i // 2}" for i in range(4000)]
    found = splits.held_out(keys, 0.05, 0, ["test", "validation"])
    sides = {keys[i]: name for name, places in found.items() for i in places}
    assert sorted(i for places in found.values() for i in places) == list(range(4000))
    assert all(
        {keys[i] for i in places} == {k for k, n in sides.items() if n == name} for name, places in found.items()
    )
    assert all(60 < len(found[name]) / 2 < 140 for name in ("test", "validation"))
    again = splits.held_out(keys[::-1][:500], 0.05, 0, ["validation"])  # another set, and no test split of its own
    assert {keys[::-1][i] for i in again["validation"]} == {k for k in keys[::-1][:500] if sides[k] == "validation"}


def test_fewer_records_are_part_of_more():
    keys = [str(i) for i in range(50)]
    few, more = splits.limited(keys, 5, 1), splits.limited(keys, 9, 1)
    assert (len(few), len(more)) == (5, 9)
    assert set(few) < set(more)
    assert more == sorted(more) != list(range(9))
    assert splits.limited(keys, 0, 1) == splits.limited(keys, 50, 1) == list(range(50))


def test_sentiment_by_hand():
    assert sentiment.score("I love my kind friend.") == 3 / 5
    assert sentiment.score("") == sentiment.score("42 !!") == 0
    assert sentiment.score("I don’t love it so; awful") == -2 / 6
    assert sentiment.score("not a bad day") == 1 / 4
    assert sentiment.score("never did it feel good") == 1 / 5  # the negation is 4 words before
    assert not sentiment.POSITIVE & sentiment.NEGATIVE


def test_half_of_the_training_records_are_positive():
    texts = {"a": "good", "b": "fine day", "c": "a day", "d": "bad", "e": "day", "f": "good bad"}
    found, middle = sentiment.labels(texts, "abcd")
    assert middle == 0.25
    assert found == {"a": True, "b": True, "c": False, "d": False, "e": False, "f": False}


def test_an_index_file_is_checked(tmp_path):
    path = tmp_path / "index.json"
    sentiment.write(path, {"t3_b": True, "t3_a": False}, -0.25)
    assert sentiment.read(path) == {"t3_b": True, "t3_a": False}
    # sha256sum of the line {"t3_a":false,"t3_b":true} without its line break
    assert sentiment.checksum({"t3_b": True, "t3_a": False}) == SHA
    path.write_text(path.read_text().replace("false", "true"))
    with pytest.raises(UserError, match=r"index\.json: its sha256 is not that of its labels"):
        sentiment.read(path)
    path.write_text('{"sha256": "x", "labels": {"a": 1}}')
    with pytest.raises(UserError, match="the label of 'a' is 1; it must be true or false"):
        sentiment.read(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a sentiment index"):
        sentiment.read(path)


SHA = "5f0dfe8523af7cbb707b192720c23fd02c47ac537471fcbfd50912a4f386177e"
