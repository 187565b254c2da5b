"""Losses: PPO's clipped surrogate, IMPALA's policy gradient, or one of the user's (``learner.loss``)."""

# T time, B segments, A actions, H hidden

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from shoal import given
from shoal.learner.config import IMPALA, PPO, LearnerConfig
from shoal.learner.schedules import ScheduledSettings
from shoal.policy.recurrent_policy import RecurrentPolicy
from tensordict import TensorDict
from torch import Tensor

RESERVED = frozenset({"approx_kl", "update_kl", "grad_norm", "l2_init_loss", "explained_variance", "advantage_std"})
"""Terms that every update has, whatever its loss."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a loss is made of: one shard of a batch under the current weights. Tensors are [T, B], float32, without
    gradient unless said otherwise.

    A loss is a function of this that returns its terms by name: scalars, of which ``loss`` is minimized and the others
    are shown. Each is the shard's part of a mean over the whole batch, as ``mean`` makes it, so that the parts of all
    shards and learners add up. All calls return the same names. A loss has no state: layers that only it needs belong
    to the policy, where the optimizer and checkpoints find them.
    """

    log_prob: Tensor
    """log pi of the actions taken, with gradient."""
    entropy: Tensor
    """Entropy of pi in nats, with gradient."""
    value: Tensor
    """V in units of the reward, with gradient."""
    logits: Tensor
    """[T, B, A], with gradient, as ``PolicyOutput`` has them; those of illegal actions are -1e9."""
    core: Tensor | None
    """[T, B, H]: the memory's output, which the heads read, with gradient; None of policies with an ``unroll`` of their
    own that leaves it out."""
    behavior_log_prob: Tensor
    """log mu: of the policy that acted."""
    old_log_prob: Tensor
    """log pi of the policy before the update; log mu with one pass, which makes no forward pass before it."""
    old_value: Tensor
    """V before the update, which value clipping is measured from."""
    advantage: Tensor
    """Normalized already, where that is configured; without an importance weight."""
    vs: Tensor
    """Value targets, in units of the reward."""
    valid: Tensor
    """bool; false on reset transitions, which only lead from one episode to the next."""
    count: int
    """Valid transitions of the whole batch, over all shards and learners."""
    value_std: float
    """S, the unit of values: the spread of their targets, or 1. With 0, targets that have never varied, there is no
    value loss."""
    batch: TensorDict
    """[B], batch-major: the columns of the trajectory contract, e.g. ``reward`` [B, T] and ``obs`` [B, T + 1, ...], of
    which ``policy.read`` makes what the network reads."""
    policy: RecurrentPolicy
    config: LearnerConfig
    scheduled: ScheduledSettings
    """This update's values, which count in place of those in ``config``."""

    def mean(self, x: Tensor) -> Tensor:
        """This shard's part of the mean of ``x`` [T, B] over the valid transitions of the whole batch."""
        return (x * self.valid.to(self.value.dtype)).sum() / self.count


Loss = Callable[[LossInputs], Mapping[str, Tensor]]


def ppo_loss(inputs: LossInputs) -> dict[str, Tensor]:
    """PPO (Schulman et al. 2017) with the decoupled objective of Hilton, Cobbe and Schulman (2022), and with the value
    clipped as in PPO's implementation.

    policy: -min(rho_bar, pi_old / mu) min(r A, clip(r, 1 +- eps) A), r = pi / pi_old
    value: 1/2 max((V - vs)^2, (V_old + clip(V - V_old, +-eps S) - vs)^2) / S^2

    The ratio is clipped around the policy before the update, pi_old: measured from mu, which with a lag is some updates
    older, these had used a part of the range already. Without a lag, and with one pass, pi_old is mu.
    """
    scheduled, mean = inputs.scheduled, inputs.mean
    ratio = _log_ratio(inputs, inputs.log_prob, inputs.old_log_prob).exp()
    weight = _log_ratio(inputs, inputs.old_log_prob, inputs.behavior_log_prob).exp().clamp(max=inputs.config.rho_bar)
    clipped = ratio.clamp(1 - scheduled.clip_coef, 1 + scheduled.clip_coef)
    policy_loss = mean(weight * torch.maximum(-inputs.advantage * ratio, -inputs.advantage * clipped))
    error = (inputs.value - inputs.vs).square()
    if scheduled.value_clip_coef:
        bound = scheduled.value_clip_coef * inputs.value_std
        step = (inputs.value - inputs.old_value).clamp(-bound, bound)
        error = torch.maximum(error, (inputs.old_value + step - inputs.vs).square())
    terms = _actor_critic(inputs, policy_loss, error)
    terms["clip_fraction"] = mean(((ratio.detach() - 1).abs() > scheduled.clip_coef).to(ratio.dtype))
    return terms


def impala_loss(inputs: LossInputs) -> dict[str, Tensor]:
    """IMPALA (Espeholt et al. 2018, section 4.2).

    policy: -min(rho_bar, pi / mu) A log pi
    value: 1/2 (V - vs)^2 / S^2
    """
    rho = _log_ratio(inputs, inputs.log_prob, inputs.behavior_log_prob).detach().exp().clamp(max=inputs.config.rho_bar)
    policy_loss = inputs.mean(-rho * inputs.advantage * inputs.log_prob)
    return _actor_critic(inputs, policy_loss, (inputs.value - inputs.vs).square())


def _actor_critic(inputs: LossInputs, policy_loss: Tensor, squared_error: Tensor) -> dict[str, Tensor]:
    """policy_loss + value_coef value_loss - entropy_coef entropy, and its terms."""
    value_loss = 0.5 * inputs.mean(squared_error) * (inputs.value_std and 1 / inputs.value_std**2)
    entropy = inputs.mean(inputs.entropy)
    scheduled = inputs.scheduled
    loss = policy_loss + scheduled.value_coef * value_loss - scheduled.entropy_coef * entropy
    return {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}


def _log_ratio(inputs: LossInputs, log_prob: Tensor, other: Tensor) -> Tensor:
    # Reset transitions have a log-probability, too; a log-ratio of 0 keeps their ratio finite until they are masked.
    return (log_prob - other) * inputs.valid.to(inputs.value.dtype)


@torch.no_grad()
def divergences(inputs: LossInputs) -> dict[str, Tensor]:
    """Estimates of two KL divergences, parts of means like the terms of a loss.

    approx_kl, to the policy that acted: E[r - 1 - log r]; update_kl, to the one before the update:
    E[(log pi - log pi_old)^2] / 2.
    """
    log_ratio = _log_ratio(inputs, inputs.log_prob, inputs.behavior_log_prob)
    return {
        "approx_kl": inputs.mean(log_ratio.exp() - 1 - log_ratio),
        "update_kl": 0.5 * inputs.mean((inputs.log_prob - inputs.old_log_prob).square()),
    }


CLIP_COEF = 0.2
"""PPO's usual range of the ratio: how far one update may move what it learned from."""


def default_clip_coef(epochs: int, max_policy_lag: int = 0) -> float:
    """``learner.clip_coef=auto``: as far as one update may move the policy, or two together.

    With one pass the ratio is measured from the policy that acted, so it is that of both in any case.
    """
    return CLIP_COEF / 2 if max_policy_lag and epochs > 1 else CLIP_COEF


def find_loss(config: LearnerConfig) -> Loss:
    """The loss that ``learner.loss`` names, with ``learner.loss_kwargs``.

    Raises:
        ValueError: there is no such function or class, or it does not take the arguments.
    """
    name = config.loss
    try:
        found = given.find(name, {PPO: ppo_loss, IMPALA: impala_loss, **given.losses})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if isinstance(found, type):
        try:
            made = found(**config.loss_kwargs)
        except TypeError as error:
            raise ValueError(f"{name}: {error}; learner.loss_kwargs are {config.loss_kwargs}") from error
    else:
        made = functools.partial(found, **config.loss_kwargs) if config.loss_kwargs else found
    try:
        inspect.signature(made).bind(None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a function of shoal.LossInputs and learner.loss_kwargs ({config.loss_kwargs}), or a "
            f"class of such: {error}"
        ) from error
    return made


def checked_terms(name: str, terms: Any) -> dict[str, Tensor]:
    """The terms of a loss.

    Raises:
        ValueError: they are not scalars by name, ``loss`` among them with a gradient.
    """
    if not isinstance(terms, Mapping) or "loss" not in terms:
        raise ValueError(
            f"{name} returned {_said(terms)}, must be a mapping of scalars by name, of which 'loss' is minimized"
        )
    if taken := RESERVED & terms.keys():
        raise ValueError(f"{name} returned the terms {', '.join(sorted(taken))}, which every update has already")
    for term, value in terms.items():
        if not isinstance(term, str) or not isinstance(value, Tensor) or value.shape != ():
            raise ValueError(f"{name} returned {term!r}: {_said(value)}, must be a tensor without dimensions")
    if not terms["loss"].requires_grad:
        raise ValueError(f"{name} returned a 'loss' without a gradient: nothing in it depends on the policy's weights")
    return dict(terms)


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"the keys {', '.join(map(repr, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
