"""Intervals and paired tests against brute force, known values and properties."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from restkv_jax.evaluate.accuracy import wilson_interval
from restkv_jax.evaluate.report.statistics import bootstrap_interval, holm, paired_test

SCORES = st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(*[st.sampled_from([0, 0.2, 0.4, 0.5, 1])] * 2), min_size=1, max_size=9).map(np.array)


def brute_force(differences):
    """Share of all sign patterns whose sum is as far from zero."""
    sums = [np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=len(differences))]
    return np.mean(np.abs(sums) >= abs(np.sum(differences)) - 1e-9)


@given(PAIRS)
@settings(deadline=None)
def test_paired_test_is_the_share_of_sign_patterns(pairs):
    assert paired_test(*pairs.T) == pytest.approx(brute_force(pairs[:, 0] - pairs[:, 1]))


@pytest.mark.parametrize(("won", "lost", "equal"), [(10, 2, 30), (1, 0, 0), (40, 60, 100), (7, 7, 1)])
def test_paired_test_of_right_and_wrong_is_mcnemars(won, lost, equal):
    a = np.array([1] * won + [0] * lost + [1] * equal)
    b = np.array([0] * won + [1] * lost + [1] * equal)
    assert paired_test(a, b) == pytest.approx(scipy.stats.binomtest(won, won + lost).pvalue)


@given(st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=10).map(np.array))
@settings(deadline=None)
def test_paired_test_of_scores_that_are_no_shares_is_that_of_rounded_ones(differences):
    sums = np.abs([np.dot(signs, differences) for signs in itertools.product((-1, 1), repeat=len(differences))])
    near = 1e-4 * np.abs(differences).sum()
    low, high = (np.mean(sums >= abs(differences.sum()) + off) for off in (near, -near))
    assert low <= paired_test(differences, np.zeros_like(differences)) <= high + 1e-12


def test_paired_test_of_many_scores_that_are_no_shares():
    a, b = np.random.default_rng(1).random((2, 60))
    assert paired_test(a, b) == pytest.approx(paired_test(b, a))
    assert paired_test(a, b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=0.01)


@pytest.mark.parametrize("number", [20, 100])
def test_paired_test_of_one_sign_has_no_floor(number):
    more = np.random.default_rng(6).random(number) + 0.1
    assert paired_test(more, np.zeros(number)) == pytest.approx(2.0 ** (1 - number))


@given(PAIRS)
@settings(deadline=None)
def test_paired_test_has_no_direction(pairs):
    p = paired_test(*pairs.T)
    assert 0 < p <= 1 and p == pytest.approx(paired_test(*pairs.T[::-1]))


def test_equal_scores_do_not_differ():
    assert paired_test(np.full(5, 0.3), np.full(5, 0.3)) == 1


def test_false_alarms_are_as_rare_as_said():
    rng = np.random.default_rng(2)
    p_values = [paired_test(*rng.integers(0, 5, (2, 40)) / 4) for _ in range(400)]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.025)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 0.0]), ([[1.0]], [[1.0]])])
def test_paired_test_refuses_what_is_not_paired(a, b):
    with pytest.raises(ValueError, match="same prompts"):
        paired_test(np.array(a), np.array(b))


@given(SCORES)
@settings(deadline=None, max_examples=50)
def test_interval_holds_the_mean_and_stays_in_range(scores):
    low, high = bootstrap_interval(np.array(scores), num_resamples=200)
    assert -1e-12 <= low <= np.mean(scores) + 1e-12 and np.mean(scores) - 1e-12 <= high <= 1 + 1e-12


@pytest.mark.parametrize("score", [0, 1])
def test_interval_of_equal_scores_is_wilsons(score):
    for total in (1, 20, 200):
        found = bootstrap_interval(np.full(total, float(score)))
        np.testing.assert_allclose(found, wilson_interval(score * total, total), atol=1e-6)


def test_interval_of_equal_differences_is_two_sided():
    low, high = bootstrap_interval(np.zeros(100), limits=(-1, 1))
    assert (low, high) == pytest.approx((-high, wilson_interval(0, 100)[1]))


def test_interval_is_that_of_the_normal_distribution_for_many_scores():
    scores = np.random.default_rng(3).random(400)
    expected = scores.mean() + np.array([-1.96, 1.96]) * scores.std() / 20
    np.testing.assert_allclose(bootstrap_interval(scores), expected, atol=0.003)
    assert np.ptp(bootstrap_interval(scores, confidence=0.5)) < np.ptp(expected) / 2


def test_groups_count_the_same_whatever_their_size():
    rng = np.random.default_rng(4)
    many, few = rng.random(500) * 0.1, rng.random(50) * 0.1 + 0.9
    low, high = bootstrap_interval(many, few)
    assert low < (many.mean() + few.mean()) / 2 < high and high - low < 0.02


def test_a_group_of_one_score_counts_as_a_group():
    rng = np.random.default_rng(4)
    many = rng.random(500) * 0.1
    low, high = bootstrap_interval(many, np.ones(1))
    assert low < (many.mean() + 1) / 2 < high
    np.testing.assert_allclose(high - low, np.ptp(bootstrap_interval(many)) / 2, rtol=0.1)


def test_interval_of_equal_scores_without_limits_holds_them():
    low, high = bootstrap_interval(np.full(1, 3.0), limits=(-1, 1))
    assert low < 3 <= high


def test_intervals_cover_as_often_as_said():
    rng = np.random.default_rng(5)
    for share in (0.3, 0.9):
        found = [bootstrap_interval(rng.random(80) < share, num_resamples=400) for _ in range(200)]
        assert np.mean([low <= share <= high for low, high in found]) > 0.88


@pytest.mark.parametrize("groups", [[], [np.zeros(0)], [np.zeros((2, 2))]])
def test_interval_refuses_what_are_no_scores(groups):
    with pytest.raises(ValueError, match="groups"):
        bootstrap_interval(*groups)
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_interval(np.zeros(3), confidence=95)


def test_holm_is_the_step_down_procedure():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1, 1])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= np.array(p_values)).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
