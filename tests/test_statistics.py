import math

import numpy as np
import pytest

from jaxrlhf.evaluation.statistics import (
    jackknife,
    mean_estimate,
    mean_estimates,
    narrowed,
    over_seeds,
    wilson,
    win_rate,
)

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
    assert win_rate(np.array([0.5])) == {"mean": 0.5, "n": 1, "se": 0.0} | _half_way(1)
    assert jackknife(0.3, np.array([0.0])) == {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 1}
    assert jackknife(1.0, np.ones(5), UNIT) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 5}


def test_the_mean_lies_within_its_interval_in_spite_of_rounding():
    for value in (0.1, 0.7, 1 / 3):
        for n in range(2, 40):
            e = mean_estimate(np.full(n, value), resamples=20)
            assert e["low"] <= e["mean"] <= e["high"]


def test_win_rate_intervals_are_wilson_s_draws_count_as_more_items():
    e = win_rate(np.repeat([1.0, 0.0], [8, 2]))
    assert {k: e[k] for k in ("mean", "low", "high", "n")} == wilson(8, 10)
    # p = 2/3 and variance (6 + 4/4) / 12 - 4/9 = 5/36, where wins and losses would have 8/36: 1.6 as many items.
    e = win_rate(np.repeat([1.0, 0.5, 0.0], [6, 4, 2]))
    z2, p, n = 1.959964**2, 2 / 3, 12 * 8 / 5
    centre, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    assert (e["low"], e["high"]) == pytest.approx(((centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)))
    assert e["n"] == 12


def _half_way(n):
    """Wilson's interval around 0.5: half its width is z / (2 sqrt(n + z^2))."""
    half = 1.959963984540054 / (2 * math.sqrt(n + 1.959963984540054**2))
    return {"low": pytest.approx(0.5 - half), "high": pytest.approx(0.5 + half)}


def test_draws_alone_are_no_certainty():
    e = win_rate(np.full(10, 0.5))
    assert (e["mean"], e["n"], e["se"]) == (0.5, 10, 0.0)
    assert {k: e[k] for k in ("low", "high")} == _half_way(10)
    assert e["high"] == pytest.approx(0.7634, abs=1e-4)
    # as many wins among wins and losses: 3 of 12
    assert {k: x for k, x in win_rate(np.full(12, 0.25)).items() if k != "se"} == wilson(3, 12)


def test_the_same_items_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_estimate(values) == mean_estimate(values.copy())


def test_sets_of_one_size_are_resampled_together_to_the_same_end():
    rng = np.random.default_rng(3)
    sets = [rng.exponential(size=n) - 0.3 for n in (7, 12, 7)]
    limits = [(-0.1, 0.9), (-np.inf, np.inf), (0.0, np.inf)]
    together = mean_estimates(sets, limits, 300)
    for e, values, limit in zip(together, sets, limits, strict=True):
        assert e == pytest.approx(mean_estimate(values, 300, limits=limit))
        assert limit[0] <= e["low"] <= e["mean"] <= e["high"] <= limit[1] or not limit[0] <= e["mean"] <= limit[1]


def test_a_bootstrap_t_interval_by_hand():
    """Half of the resamples of two items hold one of them twice: 1 away, at the least error of 1/4."""
    e = mean_estimate(np.array([0.5, 2.5]))
    assert (e["mean"], e["low"], e["high"], e["n"]) == (1.5, 1.5 - 4, 1.5 + 4, 2)


def test_the_bootstrap_of_many_normal_items_is_student_s():
    values = np.random.default_rng(2).normal(size=60)
    e = mean_estimate(values, resamples=20_000)
    assert (e["high"] - e["low"]) / 2 == pytest.approx(2.001 * values.std(ddof=1) / 60**0.5, rel=0.03)


def test_intervals_over_seeds_by_hand():
    e = over_seeds([0.25, 0.75, -0.5])  # variance 0.39583; Student's 4.30265 with 2 degrees of freedom
    se = (0.3958333 / 3) ** 0.5
    assert e == pytest.approx(
        {"mean": 1 / 6, "low": 1 / 6 - 4.30265 * se, "high": 1 / 6 + 4.30265 * se, "n": 3, "se": se}
    )
    assert over_seeds([0.9, 0.8], (0.0, 1.0))["high"] == 1.0
    assert over_seeds([0.7]) == {"mean": 0.7, "n": 1}


def test_jackknife_of_a_mean_is_the_interval_of_the_mean():
    values = np.array([0.5, -1.0, 2.0, 4.0, 1.5])
    without = (values.sum() - values) / 4
    assert jackknife(values.mean(), without) == pytest.approx(mean_estimate(values))
    # Of many items that are not skewed it is the normal one.
    values = np.random.default_rng(0).normal(size=400)
    e = jackknife(values.mean(), (values.sum() - values) / 399)
    assert (e["high"] - e["low"]) / 2 == pytest.approx(1.959964 * values.std(ddof=1) / 20, rel=0.05)


def test_jackknife_below_a_limit_is_symmetric_in_the_log_of_the_room_left():
    without = np.array([0.98, 0.985, 0.99, 0.995])
    of_mean = mean_estimate(3 * without)
    spread = (of_mean["high"] - of_mean["low"]) / 2
    assert spread > 1.959964 * np.sqrt(3 / 4 * ((without - 0.9875) ** 2).sum())
    e = jackknife(0.99, without, UNIT)
    assert (1 - e["low"]) / 0.01 == pytest.approx(np.exp(spread / 0.01), rel=1e-6)
    assert (1 - e["high"]) / 0.01 == pytest.approx(np.exp(-spread / 0.01), rel=1e-6)
    wide = jackknife(0.5, np.array([0.0, 1.0, 0.0, 1.0]), UNIT)
    assert 0 == wide["low"] < wide["high"] < 1
    assert jackknife(0.5, np.array([0.0, 3.0]), (0.0, np.inf))["low"] == 0


def test_narrowed_values_have_the_variance_of_the_formula():
    without = np.array([0.5, -1.0, 2.0, 0.25])
    variance = 3 / 4 * ((without - without.mean()) ** 2).sum()
    e, wide = jackknife(0.4, narrowed(without, 3 * variance)), jackknife(0.4, without)
    assert e["high"] - e["low"] == pytest.approx((wide["high"] - wide["low"]) / 2)
    assert narrowed(without, 0.0) == pytest.approx(without)
    assert narrowed(np.full(3, 0.1), 0.7) == pytest.approx(np.full(3, 0.1))
