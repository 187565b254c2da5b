"""Action spaces as plain data, and the distributions over them.

A policy emits ``logits`` [..., P]; these classes interpret them as a distribution. They are stateless
and accept any batch shape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASKED = -1e9
"""Logit of an action that is not legal: its probability is 0, and its part of the entropy is 0 and not NaN."""


def legal(logits: Tensor, mask: Tensor | None) -> Tensor:
    """``logits`` [..., P] without the actions that ``mask`` bool [..., P] rules out; None rules out none."""
    return logits if mask is None else logits.masked_fill(~mask, MASKED)


@dataclasses.dataclass(frozen=True, slots=True)
class Discrete:
    """One or several choices per step. ``logits`` [..., sum of choices]; actions int64 [...] or [..., num choices]."""

    names: tuple[tuple[str, ...], ...]
    scalar: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(tuple(choice) for choice in self.names))
        if self.scalar and len(self.names) != 1:
            raise ValueError(f"a scalar action is one choice, got {len(self.names)}")

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One name per logit; those of several choices carry the choice's number so that names stay unique."""
        if len(self.names) == 1:
            return self.names[0]
        return tuple(f"{i}:{name}" for i, choice in enumerate(self.names) for name in choice)

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample (action, log_prob [...]) by inverting the CDF at ``uniform`` [..., num choices], each in (0, 1]."""
        actions, log_probs = [], []
        for i, part in enumerate(self._split(logits)):
            log_p = part.log_softmax(-1)
            # u > 0 skips actions of probability 0.
            action = (log_p.exp().cumsum(-1) < uniform[..., i : i + 1]).sum(-1, keepdim=True)
            # Rounding may leave the sum of all probabilities below u. What lacks (up to 1e-7) goes to the most probable
            # action, whose probability it changes least; the last one may be impossible.
            action = torch.where(action == part.shape[-1], part.argmax(-1, keepdim=True), action)
            actions.append(action)
            log_probs.append(log_p.gather(-1, action).squeeze(-1))
        if self.scalar:
            return actions[0].squeeze(-1), log_probs[0]
        return torch.cat(actions, -1), torch.stack(log_probs).sum(0)

    @property
    def num_uniform(self) -> int:
        """Uniform numbers that ``sample`` uses per row."""
        return len(self.names)

    @property
    def max_entropy(self) -> float | None:
        """Entropy of uniformly random actions, in nats."""
        return sum(math.log(len(choice)) for choice in self.names)

    def mode(self, logits: Tensor) -> Tensor:
        """The most probable action."""
        picks = [part.argmax(-1) for part in self._split(logits)]
        return picks[0] if self.scalar else torch.stack(picks, -1)

    def evaluate(self, logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """(log_prob [...], entropy [...]) of ``action`` under ``logits``."""
        log_prob = entropy = torch.zeros((), device=logits.device)
        for i, part in enumerate(self._split(logits)):
            log_p = part.log_softmax(-1)
            index = action if self.scalar else action[..., i]
            log_prob = log_prob + log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            entropy = entropy - (log_p.exp() * log_p).sum(-1)
        return log_prob, entropy

    def _split(self, logits: Tensor) -> Sequence[Tensor]:
        return (logits,) if len(self.names) == 1 else logits.split([len(choice) for choice in self.names], -1)


@dataclasses.dataclass(frozen=True, slots=True)
class Continuous:
    """A diagonal Gaussian. ``logits`` [..., 2 D] = means, log standard deviations; actions float32 [..., D], unclipped.

    The environment adapter clips actions to the bounds; log-probabilities refer to the unclipped action.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def flat_names(self) -> tuple[str, ...]:
        """One name per mean."""
        return self.names

    @property
    def num_uniform(self) -> int:
        """Uniform numbers that ``sample`` uses per row."""
        return len(self.names)

    @property
    def max_entropy(self) -> float | None:
        """None: a Gaussian's entropy has no bound."""
        return None

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample (action [..., D], log_prob [...]) by the normal quantiles of ``uniform`` [..., D], each in (0, 1]."""
        mean, log_std = logits.chunk(2, -1)
        # float32 has nothing between 1 - 2^-24 and 1, where the quantile is infinite.
        noise = torch.special.ndtri(uniform.clamp_max(1 - 2**-24))
        action = mean + log_std.exp() * noise
        return action, self.evaluate(logits, action)[0]

    def mode(self, logits: Tensor) -> Tensor:
        """The mean."""
        return logits.chunk(2, -1)[0]

    def evaluate(self, logits: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """(log_prob [...], entropy [...]) of ``action`` under ``logits``."""
        mean, log_std = logits.chunk(2, -1)
        half_log_2pi = 0.5 * math.log(2 * math.pi)
        log_prob = -0.5 * ((action - mean) * (-log_std).exp()).square() - log_std - half_log_2pi
        return log_prob.sum(-1), (log_std + half_log_2pi + 0.5).sum(-1)


Actions = Discrete | Continuous


def actions_to_json(actions: Actions) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    return {"kind": "discrete" if isinstance(actions, Discrete) else "continuous", **dataclasses.asdict(actions)}


def actions_from_json(data: Mapping[str, Any]) -> Actions:
    """The inverse of ``actions_to_json``."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    return Discrete(**fields) if data["kind"] == "discrete" else Continuous(**fields)
