"""Schedules of a user's: functions of the progress from 0 to 1, right ones and wrong ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

CONSTANT = 0.5
_calls = itertools.count()


def to_floor(progress: float, floor: float = 0.0) -> float:
    """A straight line from 1 to ``floor``."""
    return 1 + (floor - 1) * progress


def in_steps(progress: float) -> Any:
    """1, then a tenth, as numpy computes it."""
    return np.float32(1.0) if progress < 0.5 else np.float64(0.1)


def at_once(progress: float) -> float:
    """1 before the first update and a quarter after it."""
    return 0.25 if progress else 1.0


def raises(progress: float) -> float:
    """Divides by zero at the end."""
    return 1 / (1 - progress)


def unfit(progress: float, total: int) -> float:
    """Wants an argument that nobody gives."""
    return progress / total


def undefined(progress: float) -> float:
    """NaN at the end."""
    return 1.0 if progress < 1 else math.nan


def below_zero(progress: float) -> float:
    """Negative in the second half."""
    return 0.5 - progress


def endless(progress: float) -> float:
    """Infinite."""
    return math.inf


def of_tensors(progress: float) -> Any:
    """A tensor."""
    return torch.ones(())


def of_arrays(progress: float) -> Any:
    """What ``numpy.where`` makes of a number."""
    return np.where(progress < 0.5, 1.0, 0.1)


def said(progress: float) -> Any:
    """A condition."""
    return progress < 0.5


def nothing(progress: float) -> Any:
    """Forgets to return."""


def by_calls(progress: float) -> float:
    """Goes by the number of its calls."""
    return 1 / (1 + next(_calls))


def enormous(progress: float) -> Any:
    """More than a float holds."""
    return 10**400


def too_large(progress: float) -> float:
    """Finite, but no setting times it."""
    return 1.7e308


class Falling:
    """A schedule whose objects are called."""

    def __init__(self, to: float) -> None:
        self.to = to

    def __call__(self, progress: float) -> float:
        """A straight line."""
        return to_floor(progress, self.to)
