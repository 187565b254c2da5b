"""PPO's clipped surrogate, the clipped value loss and the entropy bonus, over valid transitions only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.schedules import ScheduledSettings
from torch import Tensor


class LossTerms(NamedTuple):
    """Scalars: sums over a shard's transitions divided by ``count``, so shards add up to the terms of the batch."""

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    """E[r - 1 - log r], an estimate of KL(mu || pi)."""
    clip_fraction: Tensor
    update_kl: Tensor
    """E[(log pi - log pi_old)^2] / 2, an estimate of the KL divergence that the update has made so far."""


def actor_critic_loss(
    log_prob: Tensor,
    entropy: Tensor,
    value: Tensor,
    *,
    behavior_log_prob: Tensor,
    advantage: Tensor,
    vs: Tensor,
    old_value: Tensor,
    old_log_prob: Tensor,
    valid: Tensor,
    count: int,
    value_std: float,
    config: LearnerConfig,
    scheduled: ScheduledSettings,
) -> LossTerms:
    """The loss of one shard and its terms (Schulman et al. 2017, PPO). All tensors are [T, B].

    Args:
        advantage: normalized already, where that is configured.
        vs: value targets.
        old_value: V_old, which value clipping is measured from.
        old_log_prob: log pi_old, of the policy before the update.
        valid: bool; false on reset transitions.
        count: valid transitions of the whole batch, over all learners.
        value_std: S, the unit of values: the spread of their targets, or 1. With 0, targets that have never varied,
            there is no value loss.
        scheduled: this update's values, which count in place of those in ``config``.

    policy: -min(r A, clip(r, 1 +- eps) A)
    value: 1/2 max((V - vs)^2, (V_old + clip(V - V_old, +-eps S) - vs)^2) / S^2
    """
    mask = valid.to(value.dtype)

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    # Reset transitions have a log-probability, too; a log-ratio of 0 keeps their ratio finite until they are masked.
    log_ratio = (log_prob - behavior_log_prob) * mask
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - scheduled.clip_coef, 1 + scheduled.clip_coef)
    policy_loss = mean(torch.maximum(-advantage * ratio, -advantage * clipped))
    error = (value - vs).square()
    if scheduled.value_clip_coef:
        bound = scheduled.value_clip_coef * value_std
        step = (value - old_value).clamp(-bound, bound)
        error = torch.maximum(error, (old_value + step - vs).square())
    value_loss = 0.5 * mean(error) * (value_std and 1 / value_std**2)
    mean_entropy = mean(entropy)
    loss = policy_loss + config.value_coef * value_loss - scheduled.entropy_coef * mean_entropy
    with torch.no_grad():
        approx_kl = mean(ratio - 1 - log_ratio)
        update_kl = 0.5 * mean((log_prob - old_log_prob).square())
        clip_fraction = mean(((ratio - 1).abs() > scheduled.clip_coef).to(value.dtype))
    plain = (policy_loss.detach(), value_loss.detach(), mean_entropy.detach())
    return LossTerms(loss, *plain, approx_kl, clip_fraction, update_kl)
