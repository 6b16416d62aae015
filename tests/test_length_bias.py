import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from jaxrlhf.evaluation.length_bias import RIDGE, estimates, length_controlled

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real files are not here")


def simulated(quality, bias, mean, n=4000, seed=0):
    """Verdicts of a judge with a known length bias on responses that differ in length by `mean` characters."""
    rng = np.random.default_rng(seed)
    longer_B = rng.normal(mean, 300, n)
    p_B = 1 / (1 + np.exp(-(quality + bias * np.tanh(longer_B / longer_B.std()))))
    return (rng.random(n) < p_B).astype(float), longer_B


@pytest.mark.parametrize(("quality", "bias", "mean"), [(0.0, 2.0, 300), (0.5, 1.0, -300), (-1.0, 2.0, 200)])
def test_a_known_length_bias_is_taken_out(quality, bias, mean):
    won_B, longer_B = simulated(quality, bias, mean)
    e, truth = length_controlled(won_B, longer_B, 500), 1 / (1 + np.exp(-quality))
    assert abs(won_B.mean() - truth) > 0.08
    assert e["low"] < truth < e["high"]
    assert e["high"] - e["low"] < 0.08
    assert e["n"] == 4000


def test_without_length_bias_nothing_changes():
    won_B, longer_B = simulated(0.7, 0.0, 300)
    e = length_controlled(won_B, longer_B, 500)
    assert e["low"] < won_B.mean() < e["high"]


def test_the_fit_is_the_most_likely_one_draws_included():
    rng = np.random.default_rng(1)
    won_B, longer_B = rng.choice([0.0, 0.5, 1.0], 60), rng.normal(50, 100, 60)
    x_B = np.tanh(longer_B / longer_B.std())

    def loss(c):
        z_B = c[0] + c[1] * x_B
        return np.sum(np.logaddexp(0, z_B) - won_B * z_B) + RIDGE / 2 * np.sum(c**2)

    best = minimize(loss, np.zeros(2), tol=1e-10).x
    assert length_controlled(won_B, longer_B, 10)["mean"] == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)


def test_the_interval_is_as_wide_as_other_samples_make_it():
    drawn = [length_controlled(*simulated(0.3, 1.5, 200, 400, seed), 2)["mean"] for seed in range(200)]
    e = length_controlled(*simulated(0.3, 1.5, 200, 400), 1000)
    assert e["se"] == pytest.approx(np.std(drawn), rel=0.25)
    assert e["high"] - e["low"] == pytest.approx(2 * 1.96 * e["se"], rel=0.1)


@pytest.mark.parametrize(
    ("won", "longer"),
    [([1, 1, 1, 0, 0, 0], [9, 8, 7, -7, -8, -9]), ([1] * 6, [1, 2, 3, 4, 5, 6]), ([0, 1, 1, 0], [5] * 4), ([1], [3])],
)
def test_verdicts_that_one_thing_decides_stay_finite(won, longer):
    e = length_controlled(np.array(won, float), np.array(longer, float), 200)
    assert 0 < e["low"] <= e["mean"] <= e["high"] < 1
    if len(set(longer)) == 1 and len(won) > 1:
        assert e["mean"] == pytest.approx(0.5)


def test_thirds_by_hand():
    won_B, longer_B = np.array([1.0, 0, 0.5, 1, 0, 0]), np.array([50, -9, 4, 60, -80, 3])
    thirds = estimates(won_B, longer_B, 50)["win_rate_by_length"]
    assert [(name, e["mean"], e["n"]) for name, e in thirds.items()] == [
        ("first_third", 0.0, 2),
        ("second_third", 0.25, 2),
        ("last_third", 1.0, 2),
    ]
    assert "win_rate_by_length" not in estimates(won_B[:2], longer_B[:2], 50)


@needs_data
def test_real_verdicts():
    """GPT-4 liked length: a policy that writes more than the baseline loses by the control, and the order stays."""
    found = {}
    for model in ("alpaca-farm-ppo-human", "gpt-3.5-turbo-0301", "text_davinci_001"):
        rows = json.loads((DATA / "annotations" / f"{model}.json").read_text())
        rows = [r for r in rows if r["preference"] is not None]
        won_B = np.array([0.5 if r["preference"] in (0, 1.5) else r["preference"] - 1 for r in rows])
        longer_B = np.array([len(r["output_2"]) - len(r["output_1"]) for r in rows])
        e = estimates(won_B, longer_B, 200)
        assert (e["length_controlled"]["mean"] < won_B.mean()) == (longer_B.mean() > 0)
        thirds = [t["mean"] for t in e["win_rate_by_length"].values()]
        assert thirds == sorted(thirds)
        found[model] = e["length_controlled"]["mean"]
    assert found["text_davinci_001"] < found["alpaca-farm-ppo-human"] < found["gpt-3.5-turbo-0301"]
