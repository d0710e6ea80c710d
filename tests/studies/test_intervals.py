"""Intervals, tests and numbers of runs against scipy, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softshare.studies import intervals

numbers = st.lists(st.floats(-50, 50), min_size=3, max_size=12)


@given(numbers, st.floats(0.5, 0.999))
def test_intervals_are_scipys(values, level):
    if np.std(values) < 1e-6:
        return
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    assert intervals.mean_interval(values, level) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    p = intervals.p_value(values)
    low, high = intervals.mean_interval(values, 1 - p)  # the interval that just touches zero
    assert min(abs(low), abs(high)) < 1e-6 * max(1.0, abs(low), abs(high)) or p < 1e-12


def test_values_without_spread():
    assert intervals.p_value([0.0, 0.0]) == 1.0 and intervals.p_value([2.0, 2.0]) == 0.0
    assert intervals.mean_interval([2.0, 2.0]) == (2.0, 2.0)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
def test_sign_flips_are_scipys_permutations(values):
    differences = np.array(values, dtype=float)
    expected = stats.permutation_test(
        (differences,), lambda x: np.mean(x), permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert intervals.sign_flip(values) == pytest.approx(expected.pvalue)


def test_sign_flips_of_few_and_many():
    assert intervals.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert math.isnan(intervals.sign_flip([])) and math.isnan(intervals.sign_flip([1.0, math.nan]))
    rng = np.random.default_rng(1)
    many = rng.normal(0.4, 1.0, 24)  # random signs stand for all 16 million
    assert intervals.sign_flip(many) == pytest.approx(intervals.p_value(many), abs=0.01)


def test_holm_by_hand():
    assert intervals.holm_levels([0.01, 0.04, 0.03]) == pytest.approx([1 - 0.05 / 3, 0.975, 0.975])
    assert intervals.holm_levels([0.001, 0.9, 0.02]) == pytest.approx([1 - 0.05 / 3, 0.95, 0.975])
    assert intervals.holm_levels([0.04]) == pytest.approx([0.95]) and intervals.holm_levels([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_in_the_textbook(p_values):
    rejected, order = set(), sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        if p_values[place] > 0.05 / (len(p_values) - rank):
            break
        rejected.add(place)
    levels = intervals.holm_levels(p_values)
    assert {place for place, level in enumerate(levels) if p_values[place] <= 1 - level + 1e-15} >= rejected
    for place, level in enumerate(levels):
        if place not in rejected:
            assert p_values[place] > 1 - level - 1e-15


def test_numbers_that_cannot_be_told():
    assert intervals.needed_to_see(0.0, 1.0) is None and intervals.needed_to_see(1.0, 0.0) == 2


def test_the_number_that_sees_a_difference_does_by_simulation():
    n = intervals.needed_to_see(1.0, 1.5)
    assert n == 20  # as in tables of the power of the t test
    rng = np.random.default_rng(0)
    found = stats.ttest_1samp(rng.normal(1.0, 1.5, size=(20_000, n)), 0.0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    thousands = intervals.needed_to_see(0.01, math.sqrt(2) * 0.1)
    assert thousands == pytest.approx((1.96 + 0.8416) ** 2 * 2 * 0.1**2 / 0.01**2, rel=0.01)
