"""The statistics of small samples by which claims are judged: intervals, tests, corrections, and how many runs are needed.

Everything is for n differences between paired runs, or n runs, and a mean. scipy does the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean of n >= 2 values."""
    array = np.asarray(values, dtype=float)
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)


def p_value(values: Sequence[float]) -> float:
    """p of Student's two-sided test that the mean of n >= 2 values is 0."""
    array = np.asarray(values, dtype=float)
    if array.std(ddof=1) == 0.0:
        return 0.0 if array.mean() else 1.0
    return float(stats.ttest_1samp(array, 0.0).pvalue)


def sign_flip(values: Sequence[float]) -> float:
    """p of the two-sided sign-flip test: how often random signs make a sum at least as large; NaN without values.

    It assumes no distribution, only symmetry. With n pairs it is at least 2 / 2^n, so it cannot be small below six. Above
    16 values 100,000 random signs stand for all of them.
    """
    array = np.asarray(values, dtype=float)
    if not len(array) or not np.isfinite(array).all():
        return math.nan
    if len(array) > 16:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(100_000, len(array)))
    else:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(array))))
    sums = np.abs(signs @ array)
    return float(np.mean(sums >= abs(array.sum()) * (1 - 1e-12)))


def holm_levels(p_values: Sequence[float], level: float = LEVEL) -> list[float]:
    """The confidence of each claim's interval such that "excludes zero" is Holm's step-down test (1979).

    Of m claims the one with the smallest p is tested at (1 - level) / m, the next at (1 - level) / (m - 1), and so on, until
    one fails; those after it are tested at the level at which that one failed.
    """
    order, m = np.argsort(p_values, kind="stable"), len(p_values)
    found, failed = [0.0] * m, 0.0
    for rank, place in enumerate(order):
        allowed = failed or (1 - level) / (m - rank)
        found[place] = 1 - allowed
        if not failed and p_values[place] > allowed:
            failed = allowed
    return found


def needed_to_see(difference: float, spread: float, power: float = 0.8, level: float = LEVEL) -> int | None:
    """The least number of pairs with which Student's test finds a true mean difference with that probability; None for 0.

    `spread` is the standard deviation of the difference of a pair: for runs that share nothing but their recipe, that of
    single runs times the square root of 2.
    """
    if difference == 0 or not math.isfinite(spread):
        return None
    if spread == 0:
        return 2

    def sees(n: int) -> bool:
        limit, shift = stats.t.ppf((1 + level) / 2, n - 1), abs(difference) / spread * math.sqrt(n)
        return bool(stats.nct.sf(limit, n - 1, shift) >= power)  # the other tail counts for nothing

    return _least(sees)


def _least(enough: Callable[[int], bool]) -> int:
    """The least n >= 2 that is enough, for a condition that holds from some n on."""
    high = 2
    while not enough(high):
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
