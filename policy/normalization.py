"""Normalization of vector observations and of values, as parts of the network.

The statistics are persistent buffers of the policy, so that every version of the weights carries its own: they are
published, hashed, saved and frozen with it. The learner moves them, between updates only (``learner.normalization``).

Fresh statistics have scale 0: until a learner has seen observations, the network sees zeros, and values are 0. So
nothing depends on the units of observations and rewards, not even the first update.
"""

# N rows

from __future__ import annotations

import torch
from shoal.policy.observation import VectorObservation
from shoal.policy.precision import at_least_float32
from torch import Tensor, nn

LIMIT = 10.0
"""Largest magnitude of a normalized number, in standard deviations."""


class ObservationNormalizer(nn.Module):
    """Numbers [N, size], in the order of the trained observation -> (x - mean) * scale within +-``LIMIT``.

    Args:
        trained: the observation that the weights are trained with; its categorical columns stay as they are.
        columns: for each of its columns the environment's, or ``presented.size`` if the environment lacks it; None if
            none moves. Columns that the environment lacks are 0, which is their mean.
        presented: the environment's observation.
    """

    def __init__(self, trained: VectorObservation, columns: Tensor | None, presented: VectorObservation) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        """1 / standard deviation; 0 of a column that has not varied yet."""
        self.present: Tensor
        """bool [size]: columns that the environment has."""
        self.measured: Tensor
        """bool [size]: columns with statistics, which are all but the categorical ones."""
        measured = torch.ones(trained.size, dtype=torch.bool)
        measured[list(trained.categorical)] = False
        present = torch.ones(trained.size, dtype=torch.bool) if columns is None else columns != presented.size
        self.register_buffer("mean", torch.zeros(trained.size))
        self.register_buffer("scale", torch.where(measured, 0.0, 1.0))
        self.register_buffer("measured", measured, persistent=False)
        self.register_buffer("present", present, persistent=False)
        self._all_present = bool(present.all())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [N, size]."""
        x = ((x - self.mean) * self.scale).clamp_(-LIMIT, LIMIT)
        return x if self._all_present else x * self.present


class ValueScale(nn.Module):
    """The value head's output [N] -> output * std + mean: the value in units of the reward.

    ``rescale`` is PopArt (van Hasselt et al. 2016, Learning values across many orders of magnitude): statistics that
    move leave values as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        """The value in units of the reward, in float32 or wider."""
        return at_least_float32(value) * self.std + self.mean

    @torch.no_grad()
    def rescale(self, head: nn.Linear, mean: float, std: float) -> None:
        """Take new statistics and change the value head so that values stay the same.

        w' = w std / std', b' = (b std + mean - mean') / std'. A head without statistics (std 0) says 0 for every
        observation; it keeps its weights.
        """
        old_mean, old_std = float(self.mean), float(self.std)
        if old_std > 0 and std > 0:
            head.weight.mul_(old_std / std)
            assert head.bias is not None
            head.bias.mul_(old_std / std).add_((old_mean - mean) / std)
        self.mean.fill_(mean)
        self.std.fill_(std)
