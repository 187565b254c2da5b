"""Running statistics of observations and value targets, from which a policy's normalization follows.

The policy has means and scales in float32 (``policy.normalization``); the learner keeps what they are made from, in
float64, and moves both after an update. Sums run over all learners, so that all have the same statistics.
"""

# T time, B segments, N columns

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from shoal.learner.forward_pass import valid_transitions
from shoal.policy.normalization import ObservationNormalizer
from shoal.policy.observation import numbers_of
from shoal.policy.recurrent_policy import RecurrentPolicy
from tensordict import TensorDict
from torch import Tensor

log = logging.getLogger(__name__)

MANY = 10_000
"""Steps after which a column that has not varied is reported."""
OUTLIER = 100.0
"""Observations count as at most this many standard deviations from the mean: one broken reading cannot spoil the
statistics of a whole run, and a spread that really grows is followed within a few updates."""
CONSTANT = 2.0**-22
"""A column whose standard deviation is smaller than this part of its mean varies by float32's rounding alone."""
VALUE_RATE = 0.1
"""Weight of an update's targets in the running statistics of values."""
SMALLEST_STD = 1e-3
"""Standard deviation of value targets that is assumed at least, as a part of their root mean square."""


class ObservationStatistics:
    """Count, mean and sum of squared deviations of every column (Chan et al. 1979), over valid transitions.

    Args:
        policy: whose ``vector_normalizer`` follows them.
    """

    def __init__(self, policy: RecurrentPolicy, normalizer: ObservationNormalizer) -> None:
        self._policy, self._normalizer = policy, normalizer
        self.name = ""
        """The policy's, where several are trained: warnings begin with it."""
        self._warned: set[str] = set()
        self._count, self._mean, self._deviations = torch.zeros(3, len(normalizer.mean), dtype=torch.float64)

    def sums(self, shard: TensorDict) -> Tensor:
        """[1 + 3 N]: number of valid transitions in a shard [B], and per column the sums over them of x - m and
        (x - m)^2 and their number of outliers; m is the running mean. In float64, where the device has it.

        Where a column has no spread yet, every shard takes its own values for what is usual."""
        obs = shard["obs"][:, :-1]
        x = self._policy.read_numbers(obs.reshape(-1, obs.shape[-1])).detach()
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        weight = valid_transitions(shard).reshape(-1).to(x.device, wide)
        x = x.to(wide) - self._mean.to(x.device, wide)
        high = OUTLIER * (self._deviations / self._count.clamp_min(1)).sqrt().to(x.device, wide)
        low = -high
        moves = (self._normalizer.measured & self._normalizer.present).to(x.device)
        if (unknown := (high == 0) & moves).any():
            low[unknown], high[unknown] = _usual_range(x[:, unknown])
        outliers = weight @ ((x < low) | (x > high)).to(wide)
        x = x.clamp(low, high)
        return torch.cat([weight.sum()[None], weight @ x, weight @ x.square(), outliers])

    def end_update(self, sums: Tensor) -> None:
        """Merge the ``sums`` of all shards, and move the policy's means and scales.

        With sums S1, S2 around the old mean m of n new and N old observations:
        mean' = m + S1 / (N + n), deviations' = deviations + S2 - S1^2 / (N + n).
        """
        number, (first, second, outliers) = sums[0].double(), sums[1:].double().view(3, -1)
        normalizer = self._normalizer
        moves = (normalizer.measured & normalizer.present).cpu()
        if not number:
            return
        count = self._count + number
        mean = self._mean + first / count
        deviations = (self._deviations + second - first.square() / count).clamp_min(0)
        for kept, new in ((self._count, count), (self._mean, mean), (self._deviations, deviations)):
            kept.copy_(torch.where(moves, new, kept))
        std = (self._deviations / self._count.clamp_min(1)).sqrt()
        varies = std > CONSTANT * self._mean.abs()
        scale = torch.where(varies, 1 / std, 0.0)
        for buffer, new in ((normalizer.mean, self._mean), (normalizer.scale, scale)):
            buffer.copy_(torch.where(moves, new, buffer.cpu().double()))
        self._warn(moves & ~varies & (self._count >= MANY), moves & (outliers > 0))

    def _warn(self, constant: Tensor, broken: Tensor) -> None:
        """Warn, once each, about columns [N] that say nothing and columns with readings far from all others."""
        for kind, columns, text in (
            ("constant", constant, f"never varied in {MANY:,} steps; the network sees 0 in their place"),
            (
                "broken",
                broken,
                f"had values over {OUTLIER:g} standard deviations from their mean, counted as that",
            ),
        ):
            if kind not in self._warned and columns.any():
                self._warned.add(kind)
                observation = numbers_of(self._policy.trained_observation)
                names = (observation and observation.names) or [f"obs[{i}]" for i in range(len(columns))]
                listed = [names[i] for i in columns.nonzero().flatten().tolist()]
                more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
                whose = f"{self.name}: " if self.name else ""
                log.warning("%sobservations %s%s %s", whose, ", ".join(listed[:5]), more, text)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors for a checkpoint."""
        return {"count": self._count, "mean": self._mean, "deviations": self._deviations}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _usual_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [K] that is no outlier among those of a batch [M, K], whose columns have not varied yet.

    ``OUTLIER`` times the distance from the median within which nine tenths of them lie, in place of a standard
    deviation, which one broken reading would make. Without a bound where these are equal: the others are what there is
    to see.
    """
    low, high = torch.full_like(x[0], -torch.inf), torch.full_like(x[0], torch.inf)
    varies = x.amax(0) > x.amin(0)
    if varies.any():
        x = x[:, varies]
        median = x.median(0).values
        spread = (x - median).abs().kthvalue(math.ceil(0.9 * (len(x) - 1)), 0).values
        reach = torch.where(spread > 0, OUTLIER * spread, torch.inf)
        low[varies], high[varies] = median - reach, median + reach
    return low, high


class ValueStatistics:
    """Mean and mean square of value targets, as moving averages over updates without the bias of their start."""

    def __init__(self) -> None:
        self._averages = torch.zeros(3, dtype=torch.float64)
        """Weight, mean and mean square; each begins at 0."""

    def after(self, number: float, total: float, squared: float) -> tuple[float, float]:
        """(mean, std) when an update's ``number`` targets, with their sum and sum of squares, have come in."""
        weight, mean, square = self._merged(number, total, squared).tolist()
        if not weight:
            return 0.0, 0.0
        mean, square = mean / weight, square / weight
        return mean, max(square - mean**2, SMALLEST_STD**2 * square) ** 0.5

    def merge(self, number: float, total: float, squared: float) -> None:
        """Take in the targets of one update."""
        self._averages.copy_(self._merged(number, total, squared))

    def _merged(self, number: float, total: float, squared: float) -> Tensor:
        if not number:
            return self._averages
        new = torch.tensor([1.0, total / number, squared / number], dtype=torch.float64)
        return self._averages + VALUE_RATE * (new - self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors for a checkpoint."""
        return {"averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of ``state_dict``."""
        self._averages.copy_(state["averages"])


class RunningStatistics:
    """All statistics of a learner; without any where its policy normalizes nothing."""

    def __init__(self, policy: RecurrentPolicy) -> None:
        normalizer = policy.vector_normalizer
        self.observations = None if normalizer is None else ObservationStatistics(policy, normalizer)
        self._policy, self._scale = policy, policy.value_scale
        self._values = None if self._scale is None else ValueStatistics()

    @property
    def value_std(self) -> float:
        """The unit in which values are learned; 0 before the first targets that are not all 0."""
        return 1.0 if self._scale is None else float(self._scale.std)

    def begin_values(self, number: float, total: float, squared: float) -> None:
        """Give values a first unit, from the targets of the update that is being made; ``end_update`` counts them."""
        assert self._values is not None
        self._rescale(*self._values.after(number, total, squared))

    @torch.no_grad()
    def end_update(self, observed: Tensor | None, number: float, total: float, squared: float) -> None:
        """Move the statistics by one update: sums over observations, and number, sum and squares of value targets."""
        if self.observations is not None and observed is not None:
            self.observations.end_update(observed)
        if self._values is not None:
            self._values.merge(number, total, squared)
            self._rescale(*self._values.after(0, 0, 0))

    def _rescale(self, mean: float, std: float) -> None:
        assert self._scale is not None
        self._scale.rescale(self._policy.value_head, mean, std)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Plain tensors for a checkpoint."""
        parts = {"observations": self.observations, "values": self._values}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of ``state_dict``; the policy's own statistics are loaded already, with its weights. Statistics
        that ``state`` lacks begin anew."""
        for name, part in (("observations", self.observations), ("values", self._values)):
            if part is not None and name in state:
                part.load_state_dict(state[name])
