"""Confidence intervals of means and of differences of means, by Student's t."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Difference(NamedTuple):
    """A difference of two means, with its confidence interval."""

    mean: float
    half_width: float
    """Half the width of the interval around ``mean``; NaN where there are too few values for one."""
    paired: bool

    @property
    def is_beyond_noise(self) -> bool:
        """True if the interval excludes 0; False where there is no interval."""
        return abs(self.mean) > self.half_width


def confidence_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Mean of independent ``values`` [N] and half the width of its interval, which holds the true mean with probability
    ``level``; NaN for what too few values do not give.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return float("nan"), float("nan")
    if len(x) == 1:
        return float(x[0]), float("nan")
    return float(x.mean()), t_quantile(len(x) - 1, level) * float(x.std(ddof=1)) / math.sqrt(len(x))


def difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, paired: bool, level: float = LEVEL
) -> Difference:
    """Mean of ``a`` [N] minus mean of ``b`` [M], with its interval.

    Args:
        a: independent values.
        b: independent values.
        paired: the k-th of ``a`` and of ``b`` belong together, so that what both have in common cancels. Otherwise a
            and b are independent, and may spread differently (Welch).
        level: the probability with which the interval holds the true difference.

    Raises:
        ValueError: ``paired`` values that are not equally many.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if paired:
        if len(x) != len(y):
            raise ValueError(f"paired values must be equally many, got {len(x)} and {len(y)}")
        return Difference(*confidence_interval(x - y, level), paired=True)
    if not len(x) or not len(y):
        return Difference(float("nan"), float("nan"), paired=False)
    mean = float(x.mean() - y.mean())
    if len(x) < 2 or len(y) < 2:
        return Difference(mean, float("nan"), paired=False)
    parts = np.array([x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)])
    if not parts.any():
        return Difference(mean, 0.0, paired=False)
    freedom = float(parts.sum() ** 2 / (parts**2 / [len(x) - 1, len(y) - 1]).sum())
    return Difference(mean, t_quantile(freedom, level) * math.sqrt(parts.sum()), paired=False)


@functools.lru_cache(maxsize=256)
def t_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t for which P(-t < T < t) = ``level``, with T Student's of ``freedom`` degrees, which may be fractional.

    Raises:
        ValueError: ``freedom`` is below 1, or ``level`` not between 0 and 1.
    """
    if not freedom >= 1 or not 0 < level < 1:
        raise ValueError(f"t_quantile: freedom={freedom} must be at least 1, level={level} between 0 and 1")
    low, high = 0.0, 1.0
    while _inside(high, freedom) < level:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        if _inside(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def _inside(t: float, freedom: float) -> float:
    """P(-t < T < t). With t = sqrt(freedom) tan(angle) its density is a power of the cosine, smooth on what is left to
    integrate."""
    angle = math.atan(t / math.sqrt(freedom))
    cosines = np.cos(angle / 2 * (1 + _NODES))
    integral = angle / 2 * float(_WEIGHTS @ cosines ** (freedom - 1))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return 2 / math.sqrt(math.pi) * math.exp(log_scale) * integral
