"""What each segment contributes to an update: the numbers that ``shoal replay`` shows."""

# T time

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.forward_pass import ForwardPass
from shoal.learner.vtrace import Targets
from tensordict import TensorDict
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """One segment: T steps of one slot. Means and extremes are over its valid transitions; NaN without any."""

    training_env_id: int
    """The actor times 2^32, plus the slot."""
    unroll_index: int
    """``BatchAssembler``'s: the actor's restart index times 2^32, plus the number of its unroll."""
    policy_version: int
    """Of the weights that acted."""
    steps: int
    """Valid transitions."""
    terms: dict[str, float]
    """Loss terms by name, as parts of the batch's means."""
    grad_norm: float
    """L2 norm of the gradient of its part of the loss, before clipping and without the L2-init loss."""
    ratio_mean: float
    """Importance ratio pi / mu of the actions taken."""
    ratio_max: float
    vtrace_weight: float
    """Mean of min(rho_bar, ratio), the weight of the temporal difference; 1 with learner.advantage=gae."""
    advantage_mean: float
    """In units of the reward, before normalization."""
    advantage_largest: float
    """The one of the largest magnitude, with its sign."""
    reward_sum: float
    value_mean: float
    """V in units of the reward."""
    value_target_mean: float
    """vs, likewise."""


@torch.no_grad()
def measure(
    segment: TensorDict,
    forward: ForwardPass,
    targets: Targets,
    valid: Tensor,
    terms: Mapping[str, Tensor],
    grad_norm: Tensor,
    config: LearnerConfig,
) -> Contribution:
    """The numbers of one segment [1] after its backward pass; ``forward``, ``targets`` and ``valid`` are [T, 1]."""
    ratio = (forward.log_prob - segment["behavior_log_prob"].T).exp()[valid]
    weight = torch.ones_like(ratio) if config.advantage == "gae" else ratio.clamp(max=config.rho_bar)
    advantage = targets.advantage[valid]
    nothing = not len(ratio)
    numbers = {
        "grad_norm": grad_norm,
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.mean() if nothing else ratio.max(),
        "vtrace_weight": weight.mean(),
        "advantage_mean": advantage.mean(),
        "advantage_largest": advantage.mean() if nothing else advantage[_largest(advantage)],
        "reward_sum": segment["reward"].T[valid].sum(),
        "value_mean": forward.value[valid].mean(),
        "value_target_mean": targets.vs[valid].mean(),
    }
    return Contribution(
        training_env_id=int(segment["training_env_id"]),
        unroll_index=int(segment["unroll_index"]),
        policy_version=int(segment["policy_version"]),
        steps=int(valid.sum()),
        terms={name: float(value) for name, value in terms.items()},
        **{name: float(value) for name, value in numbers.items()},
    )


def _largest(x: Tensor) -> Tensor:
    """Index of the largest magnitude; a NaN is larger than anything."""
    return torch.where(x.isnan(), torch.inf, x.abs()).argmax()
