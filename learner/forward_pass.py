"""The forward pass of training: a batch under the current weights, with resets inside its segments."""

# T time, B segments

from __future__ import annotations

from typing import NamedTuple

from shoal.learner.device import DevicePath
from shoal.learner.start_states import memory_resets, stored_state
from shoal.policy.actions import legal
from shoal.policy.precision import at_least_float32
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.resets import plan_resets
from tensordict import TensorDict
from torch import Tensor


class ForwardPass(NamedTuple):
    """One shard under the current weights; time-major."""

    log_prob: Tensor
    """[T, B]"""
    entropy: Tensor
    """[T, B]"""
    value: Tensor
    """[T, B]"""
    logits: Tensor
    """[T, B, A]; of actions that are not legal -1e9."""
    core: Tensor | None
    """[T, B, H]: the memory's output, where the policy returns it."""
    next_value: Tensor
    """[T, B], without gradient: V of the observation that each transition led to in its own episode."""


def forward_pass(policy: RecurrentPolicy, batch: TensorDict, path: DevicePath) -> ForwardPass:
    """Run ``policy`` on [B] segments, from their initial states, with resets inside."""
    is_first = memory_resets(batch).T
    final = _final_rows(batch)
    plan = plan_resets(is_first.cpu().numpy(), final and (final[0].cpu().numpy(), final[1].cpu().numpy()))
    with path.autocast():
        output, _ = policy.unroll(
            batch["obs"].transpose(0, 1),
            is_first,
            stored_state(policy.core, batch),
            plan=plan.to(path.device),
            final_obs=batch["final_obs"][final[1], final[0]] if final else None,
            return_state=False,
        )
    # Row T is only bootstrapped from.
    mask = batch.get("action_mask", None)
    logits = legal(at_least_float32(output.logits[:-1]), None if mask is None else mask[:, :-1].transpose(0, 1))
    log_prob, entropy = policy.actions.evaluate(logits, batch["action"].transpose(0, 1))
    value = at_least_float32(output.value)
    next_value = value[1:].detach()
    if final and output.final_value is not None:
        next_value = next_value.index_put(final, at_least_float32(output.final_value.detach()))
    core = None if output.core is None else at_least_float32(output.core[:-1])
    return ForwardPass(log_prob, entropy, value[:-1], logits, core, next_value)


def _final_rows(batch: TensorDict) -> tuple[Tensor, Tensor] | None:
    """(t [K], b [K]) of the transitions that bootstrap from ``final_obs``: truncated in the same-step form."""
    if "final_obs" not in batch.keys():  # noqa: SIM118  (a TensorDict iterates over rows)
        return None
    b, t = (batch["truncated"] & ~batch["terminated"]).nonzero(as_tuple=True)
    return (t, b) if len(t) else None


def valid_transitions(batch: TensorDict) -> Tensor:
    """bool [B, T]; false on reset transitions (``policy.trajectory``), which the loss masks."""
    return ~batch["is_first"][:, 1:] | batch["terminated"] | batch["truncated"]


def log_prob_error(log_prob: Tensor, batch: TensorDict, rows: Tensor | slice = slice(None)) -> Tensor:
    """max |recomputed - behavior| log-probability over segments ``rows``: the parity check's reading.

    Reset transitions count, too: their rows went through the same memory.
    """
    return (log_prob.T[rows] - batch["behavior_log_prob"][rows]).abs().max()
