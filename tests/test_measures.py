"""Numbers of policies and what lies between two of them, by hand."""

import numpy as np
import pytest

from jaxrlhf.evaluation.generalisation import comparisons, outcomes
from jaxrlhf.evaluation.length_bias import length_controlled
from jaxrlhf.evaluation.measures import Measured, differences, gap, gap_differences


def test_outcomes_by_hand():
    a_BN, b_BM = np.array([[1.5, -2.0], [0.0, 0.0]]), np.array([[1.5], [-0.5]])
    assert outcomes(a_BN, b_BM).tolist() == [0.25, 1.0]  # a draw and a loss; two wins


def test_comparisons_by_hand():
    judged = {"a": {"id": np.array([[1.0], [2.0]])}, "b": {"id": np.array([[2.0], [2.0]])}}
    characters = {"a": {"id": np.array([10.0, 2.5])}, "b": {"id": np.array([7.0, 9.5])}}
    (found,) = comparisons(judged, characters, 100)
    assert (found["a"], found["b"], found["win_rate"]["mean"]) == ("b", "a", 0.75)
    assert found["length_controlled"] == length_controlled(np.array([1.0, 0.5]), np.array([-3.0, 7.0]), 100)
    assert "win_rate_by_length" not in found  # two prompts have no thirds


def golds(**values):
    m = Measured(list(values))
    m.add_mean(("gold",), list(values), list(values.values()))
    return m


def test_gaps_by_hand():
    near, far = golds(p=3.0, q=3.0), golds(r=1.0, s=1.0, t=1.0)
    assert gap(near, far, 100) == {"gold": {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2}}


def test_differences_are_paired_by_prompt_whatever_the_order():
    """Prompts differ by hundreds, the policies by about 1: only pairing can tell them apart."""
    a, b = golds(p=1.0, q=300.0, r=-200.0, only_a=7.0), golds(r=-201.5, q=299.0, p=0.25, only_b=9.0)
    e = differences([(a, b)], 500)[0]["gold"]
    assert (e["mean"], e["n"]) == (pytest.approx((0.75 + 1.0 + 1.5) / 3), 3)
    assert -1 < e["low"] < 0.75
    assert 1.5 < e["high"] < 3
    reverse = differences([(b, a)], 500)[0]["gold"]
    assert (reverse["mean"], reverse["n"]) == (pytest.approx(-e["mean"]), 3)


def test_a_difference_of_gaps_by_hand():
    """a loses 3 - 1 = 2, b loses 2.5 - 2 = .5, prompt by prompt without noise."""
    a = {"id": golds(p=3.0, q=13.0), "ood_x": golds(r=1.0, s=11.0)}
    b = {"id": golds(p=2.5, q=12.5), "ood_x": golds(r=2.0, s=12.0)}
    e = gap_differences(a, b, "ood_x", 100)["gold"]
    assert (e["mean"], e["low"], e["high"], e["n"]) == (1.5, 1.5, 1.5, 2)


def test_across_input_differences_are_jackknifed_over_the_same_prompts(tmp_path):
    texts = ["x y z", "x y", "p q r s", "x"]
    a, b, c = Measured([0, 1, 2, 3]), Measured([3, 2, 1, 0]), Measured([0, 1, 2, 4])
    for m, held in ((a, texts), (b, texts[::-1]), (c, texts)):
        m.add_texts([[t] for t in held], False)
    same = differences([(a, b)], 100)[0]["diversity"]["across_input"]
    assert all(abs(e[k]) < 1e-12 for e in same.values() for k in ("mean", "low", "high"))
    assert "diversity" not in differences([(a, c)], 100)[0]
    assert differences([(a, c)], 100)[0]["length"]["n"] == 3
