"""Sums over valid transitions; all shards and learners compute the same means and variances from them."""

# T time, B segments

from __future__ import annotations

from typing import NamedTuple

import torch
from shoal.learner.vtrace import Targets
from torch import Tensor

ROUNDING = 1e-12
"""Part of a mean square below which a variance that was computed from it is 0."""


class Moments(NamedTuple):
    """Sums over the valid transitions of one optimizer step, in double precision."""

    transitions: float
    advantage: float
    advantage_squared: float
    residual: float
    """Sum of vs - V."""
    residual_squared: float
    target: float
    """Sum of vs."""
    target_squared: float

    def normalize(self, advantage: Tensor, valid: Tensor, unit: float = 1.0) -> Tensor:
        """[T, B] advantages with mean 0 and variance 1 over all valid transitions; 0 elsewhere.

        Differences that are small beside 1e-8 ``unit``, the spread of value targets, are taken for rounding.
        """
        if self.transitions < 2:
            return advantage
        mean = self.advantage / self.transitions
        variance = max(self.advantage_squared - self.transitions * mean**2, 0.0) / (self.transitions - 1)
        return (advantage - mean) / (variance**0.5 + 1e-8 * unit) * valid

    @property
    def advantage_std(self) -> float:
        """Standard deviation of the advantages before they are normalized; NaN without a valid transition."""
        if not self.transitions:
            return float("nan")
        mean = self.advantage / self.transitions
        return max(self.advantage_squared / self.transitions - mean**2, 0.0) ** 0.5

    @property
    def explained_variance(self) -> float:
        """1 - var(vs - V) / var(vs); NaN without a valid transition, or where vs does not vary."""
        if not self.transitions:
            return float("nan")
        residual = self.residual_squared / self.transitions - (self.residual / self.transitions) ** 2
        square = self.target_squared / self.transitions
        target = square - (self.target / self.transitions) ** 2
        # The difference of two equal numbers is their rounding.
        return 1 - residual / target if target > ROUNDING * square else float("nan")


def sum_moments(targets: Targets, value: Tensor, valid: Tensor) -> Tensor:
    """[7] float64: the ``Moments`` of one shard; ``value`` and ``valid`` are [T, B]."""
    wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has nothing wider
    advantage, vs, residual = (
        torch.where(valid, x, 0.0).to(wide) for x in (targets.advantage, targets.vs, targets.vs - value)
    )
    sums = [valid.sum().to(wide)]
    for x in (advantage, residual, vs):
        sums += [x.sum(), x.square().sum()]
    return torch.stack(sums)
