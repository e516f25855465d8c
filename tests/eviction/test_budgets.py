"""The one rule for budgets, windows and pages."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import restkv_jax as rk
from restkv_jax.eviction.budgets import budget_slots, parse_budget
from restkv_jax.kernels.paged import check_page_size


def test_budgets_of_files_and_command_lines_are_numbers_or_percentages():
    assert parse_budget(128) == parse_budget("128") == 128
    assert parse_budget("2.5%") == "2.5%"


@pytest.mark.parametrize("budget", ["", "0", "-4", "0%", "120%", "ten%", "1e3", "3.5", True, None])
def test_what_is_not_a_budget_is_refused(budget):
    with pytest.raises(ValueError, match="is not a budget; give a number of tokens such as 128"):
        parse_budget(budget)


def test_a_share_is_no_budget():
    with pytest.raises(TypeError, match=r'budget=0.1 is not a budget; .* such as "10%"'):
        rk.snapkv(0.1)


def test_percentages_are_rounded_to_the_nearest_slot():
    assert [budget_slots(budget, 1000) for budget in ("10%", "2.5%", "0.26%", "100%", 64)] == [100, 25, 3, 1000, 64]


@given(percent=st.floats(0.01, 100), length=st.integers(1, 10**6))
def test_a_percentage_of_any_prompt_is_at_least_one_slot_and_at_most_the_prompt(percent, length):
    text = f"{percent:.2f}%"
    slots = budget_slots(text, length)
    assert 1 <= slots <= length
    assert slots == 1 or abs(slots - float(text[:-1]) * length / 100) <= 0.5 + 1e-6


@pytest.mark.parametrize("name", sorted(set(rk.METHODS) - {"full"}))
def test_a_percentage_resolves_to_the_policy_with_that_many_slots(name):
    policy = rk.METHODS[name](budget="12.5%")
    assert policy.resolved(640) == rk.METHODS[name](budget=80)
    assert hash(policy) != hash(policy.resolved(640)) and policy != policy.resolved(640)
    assert policy.resolved(640).resolved(1280) == policy.resolved(640)
    assert policy.replace(budget=80) == policy.resolved(640)


def test_numbers_and_no_budget_are_what_they_are():
    for policy in (rk.full(), rk.restkv(budget=64), rk.laprox()):
        assert policy.resolved(1000) is policy


@given(budget=st.integers(1, 300), window=st.integers(1, 300))
def test_a_window_that_does_not_fit_shrinks_to_half_of_the_budget(budget, window):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = rk.restkv(budget=budget, window=window)
    assert policy.budget == budget
    if window < budget or budget == window == 1:
        assert policy.window == window and not caught
    else:
        assert policy.window == max(1, budget // 2)
        (warning,) = caught
        expected = f"budget={budget} is too small for window={window}, which shrinks to {policy.window}"
        assert str(warning.message) == expected


def test_a_window_shrinks_where_a_percentage_is_resolved():
    policy = rk.snapkv(budget="10%")
    with pytest.warns(UserWarning, match="budget=11 is too small for window=32, which shrinks to 5"):
        resolved = policy.resolved(112)
    assert (resolved.budget, resolved.window, policy.window) == (11, 5, 32)


@given(budget=st.integers(1, 300), page_size=st.sampled_from([8, 16, 32, 64, 128]))
def test_a_page_is_the_largest_that_fits_and_never_below_the_smallest(budget, page_size):
    policy = rk.snapkv(budget, window=1).replace(allocation=rk.ModelWide(), page_size=page_size)
    check_page_size(policy.page_size)
    assert policy.page_size <= max(8, min(budget, page_size))
    assert 2 * policy.page_size > min(budget, page_size)


def test_what_a_method_refuses_of_numbers_it_refuses_of_percentages():
    with pytest.raises(ValueError, match="budget=5% of 80 tokens is 4 slots: budget=4 must exceed sinks=4"):
        rk.streaming_llm(budget="5%").resolved(80)
    assert rk.streaming_llm(budget="10%").resolved(80) == rk.streaming_llm(budget=8)
    with pytest.raises(ValueError, match="budget=50% of 1,000 tokens is 500 slots: candidates=100 must be at least"):
        rk.laprox(budget="50%", candidates=100).resolved(1000)
    with pytest.raises(ValueError, match="exclude each other"):
        rk.restkv(budget="10%", allocation="model", while_generating=True)


def test_a_layer_keeps_a_percentage_of_its_keys():
    normal = np.random.default_rng(0).standard_normal
    arrays = normal((1, 4, 5, 8)), normal((1, 2, 50, 8)), normal((1, 2, 50, 8)), normal((4, 8, 20))
    kept = rk.evict_layer(rk.snapkv(budget="20%", window=5), *arrays)
    expected = rk.evict_layer(rk.snapkv(budget=10, window=5), *arrays)
    np.testing.assert_array_equal(kept.positions, expected.positions)
    assert kept.positions.shape == (1, 2, 10)
