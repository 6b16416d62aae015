import math

import numpy as np
import pytest

from jaxrlhf.evaluation.statistics import difference_estimate, jackknife, mean_estimate, wilson, win_rate

UNIT = (0.0, 1.0)


def test_wilson_by_hand():
    e = wilson(8, 10)  # Wilson (1927), z = 1.96
    assert (e["mean"], e["n"]) == (0.8, 10)
    assert (e["low"], e["high"]) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5)["low"] == 0
    assert wilson(5, 5)["high"] == 1


def test_win_rate_standard_error_is_that_of_alpaca_eval():
    outcomes = np.array([1, 0, 0.5, 1, 1.0])
    e = win_rate(outcomes)
    assert e["mean"] == pytest.approx(0.7)
    assert e["se"] == pytest.approx(np.std(outcomes, ddof=1) / 5**0.5)
    assert e["low"] <= e["mean"] <= e["high"]


def test_one_item_and_constant_items_are_finite():
    for values in ([0.25], [2.0] * 7):
        e = mean_estimate(np.array(values))
        assert e["low"] == e["mean"] == e["high"] == values[0]
    assert win_rate(np.array([1.0]))["se"] == 0
    assert win_rate(np.array([0.5])) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1, "se": 0.0}
    assert jackknife(0.3, np.array([0.0])) == {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 1}
    assert jackknife(1.0, np.ones(5), UNIT) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 5}


def test_the_mean_lies_within_its_interval_in_spite_of_rounding():
    for value in (0.1, 0.7, 1 / 3):
        for n in range(2, 40):
            e = mean_estimate(np.full(n, value), resamples=20)
            assert e["low"] <= e["mean"] <= e["high"]


def test_win_rate_intervals_wilson_without_draws_else_bootstrap():
    e = win_rate(np.repeat([1.0, 0.0], [8, 2]))
    assert {k: e[k] for k in ("mean", "low", "high", "n")} == wilson(8, 10)
    drawn = np.repeat([1.0, 0.5, 0.0], [6, 4, 2])
    assert {k: v for k, v in win_rate(drawn).items() if k != "se"} == mean_estimate(drawn)


def test_wilson_covers_at_100():
    # Exactly, by the binomial distribution; it jumps about 95 % with p, as the number of wins is whole.
    intervals = [wilson(w, 100) for w in range(101)]
    coverage = [
        sum(
            math.comb(100, w) * p**w * (1 - p) ** (100 - w)
            for w, e in enumerate(intervals)
            if e["low"] <= p <= e["high"]
        )
        for p in np.linspace(0.05, 0.95, 91)
    ]
    assert 0.945 <= np.mean(coverage) <= 0.96
    assert min(coverage) > 0.91


def test_the_same_items_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_estimate(values) == mean_estimate(values.copy())


@pytest.mark.parametrize("n", [100, 500])
def test_bootstrap_intervals_cover_95_of_100_times(n):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(600):
        e = mean_estimate(rng.exponential(size=n) - 0.5, resamples=400)
        hits += e["low"] <= 0.5 <= e["high"]
    assert 0.925 <= hits / 600 <= 0.97


def test_difference_of_independent_sets_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(500):
        e = difference_estimate(rng.normal(0.3, 1, 80), rng.normal(-0.2, 2, 120), resamples=400)
        hits += e["low"] <= 0.5 <= e["high"]
    assert 0.92 <= hits / 500 <= 0.98


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.array([0.5, -1.0, 2.0, 4.0, 1.5])
    without = (values.sum() - values) / 4
    e = jackknife(values.mean(), without)
    assert (e["high"] - e["low"]) / 2 == pytest.approx(1.959964 * values.std(ddof=1) / 5**0.5, abs=1e-5)


def test_jackknife_below_a_limit_is_symmetric_in_the_log_of_the_room_left():
    without = np.array([0.98, 0.985, 0.99, 0.995])
    spread = 1.959964 * np.sqrt(3 / 4 * ((without - 0.9875) ** 2).sum())
    e = jackknife(0.99, without, UNIT)
    assert (1 - e["low"]) / 0.01 == pytest.approx(np.exp(spread / 0.01), rel=1e-6)
    assert (1 - e["high"]) / 0.01 == pytest.approx(np.exp(-spread / 0.01), rel=1e-6)
    wide = jackknife(0.5, np.array([0.0, 1.0, 0.0, 1.0]), UNIT)
    assert 0 == wide["low"] < wide["high"] < 1
    assert jackknife(0.5, np.array([0.0, 3.0]), (0.0, np.inf))["low"] == 0
