"""V-trace targets (Espeholt et al. 2018, IMPALA, eq. 1) with lambda, cut at every episode's end."""

# T time, B rows

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The targets of one update."""

    vs: Tensor
    """[T, B] value targets; V itself on reset transitions."""
    advantage: Tensor
    """[T, B] advantages; 0 on reset transitions."""


@torch.no_grad()
def vtrace(
    log_rho: Tensor,
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    valid: Tensor,
    *,
    gamma: float,
    lambda_: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> Targets:
    """Targets of T transitions of B rows. All tensors are [T, B].

    Args:
        log_rho: log pi(a|x) - log mu(a|x); zeros give GAE(lambda).
        reward: r_t.
        value: V(x_t).
        next_value: V(x_{t+1}) in the transition's own episode: of the true final observation where the episode ended
            there, of row T where the unroll ends.
        terminated: bool; the episode has no further return, so the transition does not bootstrap.
        ended: bool; terminated or truncated, which cuts the trace: nothing leaks from the next episode.
        valid: bool; false on reset transitions, which have no delta and cut the trace.

    With c_t = lambda min(c_bar, rho_t) and delta_t = min(rho_bar, rho_t) (r_t + gamma V(x_{t+1}) - V(x_t)):
        vs_t - V(x_t) = delta_t + gamma c_t (vs_{t+1} - V(x_{t+1}))
        advantage_t = r_t + gamma (V(x_{t+1}) + lambda (vs_{t+1} - V(x_{t+1}))) - V(x_t)
    The advantage carries no rho_t: the surrogate's ratio is the importance weight of a_t.
    """
    rho = log_rho.exp()
    mask = valid.to(value.dtype)
    td_error = (reward + gamma * torch.where(terminated, 0.0, next_value) - value) * mask
    delta = rho.clamp(max=rho_bar) * td_error
    carry = gamma * lambda_ * mask * ~ended
    trace = carry * rho.clamp(max=c_bar)
    excess = value.new_zeros(len(value) + 1, *value.shape[1:])  # vs_t - V(x_t), row T: 0
    for t in range(len(reward) - 1, -1, -1):
        torch.addcmul(delta[t], trace[t], excess[t + 1], out=excess[t])
    return Targets(value + excess[:-1], td_error + carry * excess[1:])
