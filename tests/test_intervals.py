"""Intervals against tables of Student's t and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from shoal.deploy.monitoring.intervals import confidence_interval, difference, t_quantile

TABLE = {1: 12.7062047, 2: 4.3026527, 5: 2.5705818, 10: 2.2281389, 30: 2.0422725, 100: 1.9839715, 1000: 1.9623391}
"""Student's t by degrees of freedom, for 95% between -t and t."""


def test_quantiles_are_those_of_the_tables() -> None:
    """Catches the normal distribution in place of Student's, which is far too narrow for few values."""
    for freedom, quantile in TABLE.items():
        assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-7)
    assert t_quantile(10**7) == pytest.approx(1.9599640, rel=1e-6)
    assert t_quantile(4, 0.99) == pytest.approx(4.6040949, rel=1e-7)
    # Between two whole numbers, as Welch needs it.
    assert TABLE[5] < t_quantile(4.5) < t_quantile(4.0) < TABLE[2]
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1.0, 1.7, 3.3, 12.5, 77.7):
        assert t_quantile(freedom, 0.9) == pytest.approx(stats.t.ppf(0.95, freedom), rel=1e-9)
    for freedom, level in ((0.5, 0.95), (float("nan"), 0.95), (3, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="t_quantile"):
            t_quantile(freedom, level)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Catches a missing square root, the wrong divisor, one degree of freedom too many."""
    rng = np.random.default_rng(0)
    held = 0
    for values in rng.normal(3.0, 2.0, (4000, 4)):
        mean, half_width = confidence_interval(values)
        held += abs(mean - 3.0) <= half_width
    assert abs(held / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert confidence_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 2.0542603))


def test_too_few_values_give_no_interval() -> None:
    """Catches an interval of width 0, a division by zero or a warning where there is one value or none."""
    assert confidence_interval([3.0])[0] == 3.0
    assert math.isnan(confidence_interval([3.0])[1])
    assert all(map(math.isnan, confidence_interval([])))
    assert confidence_interval([2.0, 2.0, 2.0]) == (2.0, 0.0)
    for found in (difference([1.0], [2.0, 3.0], paired=False), difference([1.0], [2.0], paired=True)):
        assert found.mean < 0
        assert math.isnan(found.half_width)
        assert not found.is_beyond_noise


def test_pairs_cancel_what_they_share() -> None:
    """Catches pairs that are taken for independent, and independent values that are taken for pairs."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, 40)
    a, b = shared + rng.normal(0.5, 0.1, 40), shared + rng.normal(0.0, 0.1, 40)
    paired, apart = difference(a, b, paired=True), difference(a, b, paired=False)
    assert paired.mean == pytest.approx(apart.mean)
    assert paired.is_beyond_noise
    assert not apart.is_beyond_noise
    assert apart.half_width > 50 * paired.half_width
    with pytest.raises(ValueError, match="equally many"):
        difference(a, b[:-1], paired=True)


def test_independent_values_may_spread_differently() -> None:
    """Catches a pooled variance, and degrees of freedom that are not Welch's. (R: t.test(a, b))"""
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2]
    found = difference(a, b, paired=False)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert difference([1.0, 1.0], [0.0, 0.0], paired=False) == (1.0, 0.0, False)
    assert difference([1.0, 1.0], [0.0, 0.0], paired=False).is_beyond_noise
