import numpy as np
import pytest

from jaxrlhf.evaluation.statistics import difference_estimate, jackknife, mean_estimate, wilson, win_rate


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


def test_the_same_items_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_estimate(values) == mean_estimate(values.copy())


@pytest.mark.parametrize("n", [100, 500])
def test_bootstrap_intervals_cover_95_of_100_times(n):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(1000):
        e = mean_estimate(rng.exponential(size=n) - 0.5, resamples=400)
        hits += e["low"] <= 0.5 <= e["high"]
    assert 0.925 <= hits / 1000 <= 0.97


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
