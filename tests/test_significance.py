"""P-values that agree with their intervals, Holm's correction, and advice on sample sizes."""

import math

import numpy as np
import pytest
from scipy.stats import t

from jaxrlhf.evaluation.significance import corrected, holm, needed, p_value
from jaxrlhf.evaluation.statistics import difference_estimate, jackknife, mean_estimate, win_rate


def test_holm_by_hand():
    # .01 x 4, .02 x 3, then .03 x 2 = .06; .06 x 1 is no less than the one before
    assert holm([0.03, 0.01, 0.06, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.4]) == pytest.approx([0.9, 0.8])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([0.01, 0.01]) == [0.02, 0.02]
    assert holm([]) == []


def test_p_of_a_student_interval_is_student_s():
    """t = 2.5 with 9 degrees of freedom has a two-sided p of .03386."""
    e = {"mean": -0.5, "low": -0.5 - 2.262157 * 0.2, "high": -0.5 + 2.262157 * 0.2, "n": 10}
    assert p_value(e, 0.0, 9) == pytest.approx(0.03386, abs=1e-5)
    assert p_value(e | {"mean": 0.0}, 0.0, 9) == 1.0


def test_p_is_below_5_percent_exactly_where_the_interval_leaves_the_null_out():
    rng = np.random.default_rng(0)
    decided = 0
    for _ in range(200):
        n, shift = int(rng.integers(6, 60)), rng.normal(0, 0.4)
        skewed, other = shift + rng.exponential(size=n) - 1, rng.normal(size=n + 3)
        wins = rng.choice([0.0, 0.5, 1.0], p=[0.5 - shift / 10, 0.2, 0.3 + shift / 10], size=n)
        without = (skewed.sum() - skewed) / (n - 1)
        for e, null in (
            (mean_estimate(skewed, 200), 0.0),
            (difference_estimate(skewed, other, 200), 0.0),
            (jackknife(skewed.mean(), without), 0.0),
            (win_rate(wins), 0.5),
            (win_rate(wins[wins != 0.5]), 0.5),
        ):
            left_out = e["low"] > null or e["high"] < null
            assert left_out == (p_value(e, null, max(e["n"] - 1, 1)) < 0.05)
            decided += left_out
    assert 100 < decided < 900


def test_items_that_do_not_vary_are_a_sign_test():
    for n, p in ((1, 1.0), (2, 0.5), (6, 1 / 32)):
        assert p_value(mean_estimate(np.full(n, -0.3)), 0.0, n) == p
    assert p_value(mean_estimate(np.zeros(40)), 0.0, 39) == 1.0
    assert p_value(win_rate(np.full(9, 0.5)), 0.5, 8) == 1.0


def test_items_needed_by_hand():
    """p = .2 is z = 1.28155; (1.95996 + .84162)^2 / 1.28155^2 = 4.7789 times as many. At .05 / 3: 2.39398."""
    assert needed(100, 0.2) == 478
    assert needed(100, 0.2, 0.05 / 3) == math.ceil(100 * ((2.39398 + 0.84162) / 1.28155) ** 2)
    assert needed(100, 1.0) is None
    assert needed(100, 0.99) is None  # nearly 5 million


def test_as_many_items_settle_it_4_times_of_5():
    n, true = 60, 0.2
    rng = np.random.default_rng(4)
    z = true * n**0.5
    p = math.erfc(z / 2**0.5)
    items = needed(n, p) or 0
    assert items == pytest.approx((2.80158 / true) ** 2, abs=1)
    settled = np.abs(rng.normal(true * items**0.5, 1, 20_000)) > 1.959964
    assert settled.mean() == pytest.approx(0.8, abs=0.01)


def test_comparisons_are_judged_with_those_of_the_same_measure():
    def e(z, n=50):
        return {"mean": z, "low": z - 2.009575, "high": z + 2.009575, "n": n}  # se 1, Student's with 49

    trees = [
        {"split": "id", "a": "ppo", "gold": e(4.0), "diversity": {"across_input": {"ead": e(1.0)}}},
        {"split": "far", "a": "ppo", "gold": e(-2.2), "gap": {"gold": e(2.2)}},
        {"split": "near", "a": "ppo", "gold": e(-1.0)},
    ]
    told = corrected(trees)
    golds = [x["gold"] for x in told]
    assert [g["family"] for g in golds] == [3, 3, 3]
    p = [2 * t.sf(z, 49) for z in (4.0, 2.2, 1.0)]
    assert [g["p"] for g in golds] == pytest.approx(p, rel=1e-3)
    assert [g["p_holm"] for g in golds] == pytest.approx([3 * p[0], 2 * p[1], p[2]], rel=1e-3)
    assert "n_needed" not in golds[0]
    # Two are left undecided, so that each is judged at .025: more than the 50 there are, although p is below .05.
    assert golds[1]["n_needed"] == needed(50, golds[1]["p"], 0.025)
    assert golds[1]["n_needed"] > 50
    alone = told[1]["gap"]["gold"]
    assert (alone["family"], alone["p_holm"]) == (1, alone["p"])
    assert [(x["split"], x["a"]) for x in told] == [("id", "ppo"), ("far", "ppo"), ("near", "ppo")]
    assert "p" not in trees[0]["gold"]


def test_metrics_by_blocks_have_the_degrees_of_freedom_of_their_blocks():
    e = {"mean": 3.0, "low": 3.0 - 2.262157, "high": 3.0 + 2.262157, "n": 500}
    (told,) = corrected([{"diversity": {"across_input": {"vendi_cut": e, "ead": e}, "per_input": {"vendi": e}}}])
    told = told["diversity"]
    assert told["across_input"]["vendi_cut"]["p"] == pytest.approx(0.014956, rel=1e-3)  # t = 3 with 9
    assert told["per_input"]["vendi"]["p"] == told["across_input"]["ead"]["p"] < 0.0096


def test_win_rates_are_judged_against_even():
    rows = [{"split": s, "win_rate": win_rate(np.repeat([1.0, 0.0], w))} for s, w in (("a", (70, 30)), ("b", (52, 48)))]
    told = corrected(rows, null=0.5)
    won, even = (x["win_rate"] for x in told)
    assert won["p"] == pytest.approx(6.3e-5, rel=0.6)  # of the score test, z = 4
    assert won["p_holm"] == 2 * won["p"]
    assert even["p"] == even["p_holm"] == pytest.approx(0.69, abs=0.01)  # z = .4
    assert even["n_needed"] == pytest.approx(100 * (2.8016 / 0.4) ** 2, rel=0.05)
