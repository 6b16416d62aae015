import numpy as np
import pytest

from jaxrlhf.evaluation import variety
from jaxrlhf.evaluation.measures import Measured, differences, estimates, rank
from jaxrlhf.evaluation.variety import Options, by_length, cut_length


def words(n, word="w"):
    return " ".join(f"{word}{i}" for i in range(n))


def measure(texts, **options):
    measured = {p: {"all": Measured(range(len(t)))} for p, t in texts.items()}
    cuts = variety.add(measured, {p: {"all": t} for p, t in texts.items()}, Options(**options))
    return measured, cuts


def test_all_policies_are_cut_to_the_shortest_ones_quartile():
    short = [[words(n)] for n in (2, 4, 5, 6, 7)]
    long = [[words(n)] for n in (3, 9, 9, 9, 9)]
    assert cut_length([np.array([2, 4, 5, 6, 7]), np.array([3, 9, 9, 9, 9])]) == 4
    assert cut_length([np.array([0, 0, 3])]) == 1
    measured, cuts = measure({"a": short, "b": long})
    assert cuts == {"a": {"all": {"words": 4, "reached": 0.8}}, "b": {"all": {"words": 4, "reached": 0.8}}}
    assert measure({"a": short}, cut_words=6)[1] == {"a": {"all": {"words": 6, "reached": 0.4}}}


def test_cutting_takes_length_out_of_a_comparison():
    """Texts of 30 and 60 words from one source: whole, the longer seem less varied by distinct-n; cut, they do not."""
    rng = np.random.default_rng(0)

    def texts(n):
        return [[" ".join(map(str, rng.integers(0, 300, n)))] for _ in range(200)]

    measured, cuts = measure({"short": texts(30), "long": texts(60)})
    assert cuts["long"]["all"] == {"words": 30, "reached": 1.0}
    told = differences([(measured["long"]["all"], measured["short"]["all"])], 100)[0]["diversity"]["across_input"]
    assert told["distinct"]["high"] < 0
    assert told["ead"]["low"] > 0
    assert told["distinct_cut"]["low"] < 0 < told["distinct_cut"]["high"]
    assert told["ead_cut"]["low"] < 0 < told["ead_cut"]["high"]
    assert {"self_bleu_cut", "compression_cut", "cosine_cut"} <= told.keys()


def test_numbers_do_not_hang_on_the_order_of_prompts_or_samples():
    rng = np.random.default_rng(2)
    texts = [[" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 12))) for _ in range(3)] for _ in range(30)]
    here, there = Measured(range(30)), Measured(range(30)[::-1])
    here.add_texts(texts, False, 5)
    there.add_texts([row[::-1] for row in texts[::-1]], False, 5)
    a, b = (estimates(m, 50)["diversity"] for m in (here, there))
    for scope in ("per_input", "across_input"):
        assert len(a[scope]) == 10
        for name in a[scope]:
            assert [a[scope][name][k] for k in ("mean", "n")] == pytest.approx(
                [b[scope][name][k] for k in ("mean", "n")], abs=1e-12
            )
    for place, (_, without_B) in here.sets.items():
        np.testing.assert_allclose(without_B, there.sets[place][1][::-1], atol=1e-12)
    assert rank(["x", "y", "z"])[::-1].tolist() == rank(["z", "y", "x"]).tolist()
    assert sorted(rank(range(50))) == list(range(50)) != rank(range(50)).tolist()


def test_by_length_compares_policies_at_like_lengths():
    a = [[words(n), words(n, "v")] for n in (2, 4, 6)]
    b = [[words(n), words(n)] for n in (6, 8, 10)]
    measured, _ = measure({"a": a, "b": b})
    rows = by_length({p: {"all": m["all"]} for p, m in measured.items()}, 50)["all"]
    assert [row["words"] for row in rows] == [[2, 4], [6, 6], [8, 10]]
    assert [list(row["policies"]) for row in rows] == [["a"], ["a", "b"], ["b"]]
    middle = rows[1]["policies"]
    assert (middle["a"]["length"]["mean"], middle["a"]["cosine"]["mean"], middle["b"]["cosine"]["n"]) == (6, 1, 1)
    assert middle["b"]["cosine"]["mean"] == pytest.approx(0, abs=1e-12)
    assert rows[0]["policies"]["a"]["length"]["n"] == 2
    assert not any(name.endswith("_cut") for name in middle["a"])


def test_by_length_takes_several_lengths():
    measured, _ = measure({"a": [["x y"], ["x"]]})
    assert by_length(measured, 50) == {}
    measured, _ = measure({"a": [["x y", "y x"], ["x z", "x x"]]})
    assert [row["words"] for row in by_length(measured, 50)["all"]] == [[2, 2]]


def test_by_length_of_one_response_a_prompt_takes_as_many_prompts_of_each_policy():
    """a says the same words again and again, b new ones; 40 and 30 of 2 words, 40 and 50 of more."""
    a = [["same words"]] * 40 + [[words(9, "x")]] * 30 + [[words(5)]] * 10
    b = [[f"new{i} word{i}"] for i in range(30)] + [[words(9, f"y{i}_")] for i in range(50)]
    measured, _ = measure({"a": a, "b": b})
    texts = {"a": {"all": a}, "b": {"all": b}}
    first, last = by_length(measured, 50, texts)["all"]
    assert (first["scope"], first["words"], last["words"]) == ("across_input", [2, 2], [5, 9])
    assert {p: m["ead"]["n"] for p, m in first["policies"].items()} == {"a": 30, "b": 30}
    # n = 1: 2 of 60 words; n = 2: 1 of 30; none of the others
    assert first["policies"]["a"]["distinct"]["mean"] == pytest.approx(2 * (1 / 30) / 5)
    assert first["policies"]["b"]["distinct"]["mean"] == pytest.approx(2 / 5)
    assert first["policies"]["b"]["length"]["mean"] == 2
    assert {p: m["ead"]["n"] for p, m in last["policies"].items()} == {"a": 40, "b": 40}
    few = {"a": {"all": a[:19]}, "b": {"all": b}}
    measured, _ = measure({p: t["all"] for p, t in few.items()})
    rows = by_length(measured, 50, few)["all"]
    assert [list(row["policies"]) for row in rows] == [["b"], ["b"]]
