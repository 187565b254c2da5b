"""V-trace targets (Espeholt et al. 2018, IMPALA, eq. 1) with lambda, cut at every episode's end."""

# T time, B rows

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """What the value and the policy are moved towards."""

    vs: Tensor
    """[T, B] value targets; V itself on void transitions."""
    advantage: Tensor
    """[T, B]; 0 on void transitions."""


@torch.no_grad()
def vtrace(
    log_rho: Tensor,
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    valid: Tensor,
    *,
    gamma: float,
    lambda_: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> Targets:
    """Targets of T transitions of B rows.

    Args:
        log_rho: [T, B] log pi(a|x) - log mu(a|x); zeros give GAE(lambda).
        reward: [T, B].
        value: [T + 1, B]; row t+1 bootstraps transition t, also where it was truncated: next-step autoreset keeps an
            episode's final observation as a row of its own. Where the unroll's end cuts an episode, that row is row T.
        terminated: bool [T, B]; nothing follows, so nothing is bootstrapped.
        valid: bool [T, B]; false on void transitions, which have no delta and cut the trace. The one after an episode's
            final observation is void, so nothing leaks from the next episode.

    With c_t = lambda min(c_bar, rho_t) and delta_t = min(rho_bar, rho_t) (r_t + gamma V(x_{t+1}) - V(x_t)):
        vs_t - V(x_t) = delta_t + gamma c_t (vs_{t+1} - V(x_{t+1}))
        advantage_t = r_t + gamma (V(x_{t+1}) + lambda (vs_{t+1} - V(x_{t+1}))) - V(x_t)
    The advantage carries no rho_t: the surrogate's ratio is the importance weight of a_t.
    """
    rho = log_rho.exp()
    discount = gamma * (~terminated).to(value.dtype)
    td_error = reward + discount * value[1:] - value[:-1]
    mask = valid.to(value.dtype)
    delta = rho.clamp(max=rho_bar) * td_error * mask
    trace = discount * lambda_ * rho.clamp(max=c_bar) * mask
    excess = torch.zeros_like(value)  # vs_t - V(x_t), row T: 0
    for t in range(len(reward) - 1, -1, -1):
        torch.addcmul(delta[t], trace[t], excess[t + 1], out=excess[t])
    advantage = (td_error + discount * lambda_ * excess[1:]) * mask
    return Targets(value[:-1] + excess[:-1], advantage)
