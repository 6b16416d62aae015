import itertools

import numpy as np
import pytest

from jaxrlhf.policies import best_of_n


def test_best_of_the_whole_pool_is_the_first_maximum():
    score_BM = np.array([[0.5, -1.25, 2.0, 2.0], [-3.0, -2.5, -2.75, -9.0]])
    picked_BD = best_of_n(score_BM, 4, 3, np.random.default_rng(0))
    assert (score_BM.max(1, keepdims=True) == score_BM[[0, 1], picked_BD.T].T).all()
    assert (picked_BD[1] == 1).all()


def test_best_of_one_is_uniform_over_the_pool():
    picked = best_of_n(np.arange(5.0)[None], 1, 20_000, np.random.default_rng(1))[0]
    assert sorted(best_of_n(np.arange(5.0)[None], 1, 5, np.random.default_rng(1))[0]) == [0, 1, 2, 3, 4]
    assert np.abs(np.bincount(picked, minlength=5) / 20_000 - 0.2).max() < 0.015


def test_expected_best_of_n_equals_enumeration_over_subsets():
    score_M = np.array([0.3, -1.5, 2.25, 0.9, -0.2, 1.1])
    exact = np.mean([max(s) for s in itertools.combinations(score_M, 3)])
    picked = best_of_n(score_M[None], 3, 40_000, np.random.default_rng(2))[0]
    assert abs(score_M[picked].mean() - exact) < 0.02


def test_a_pool_that_is_large_enough_gives_each_draw_samples_of_its_own():
    score_BM = np.random.default_rng(5).normal(size=(300, 24))
    picked_BD = best_of_n(score_BM, 4, 6, np.random.default_rng(6))
    assert all(len(set(row)) == 6 for row in picked_BD.tolist())
    # six groups of four share the pool out between them, so the best sample of all is always picked
    assert (np.take_along_axis(score_BM, picked_BD, 1).max(1) == score_BM.max(1)).all()
    exact = np.mean([max(rng.normal(size=4)) for rng in map(np.random.default_rng, range(4000))])
    assert np.take_along_axis(score_BM, picked_BD, 1).mean() == pytest.approx(exact, abs=0.08)


def test_draws_differ_so_that_diversity_can_be_measured():
    picked = best_of_n(np.random.default_rng(3).normal(size=(1, 64)), 16, 16, np.random.default_rng(4))[0]
    assert len(set(picked.tolist())) > 1
