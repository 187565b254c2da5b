"""The state that training of a segment starts from, and its staleness.

An actor's state was made by the weights that acted; the update has newer ones. There are three ways, at growing cost:

- *stored* (default): the state that travelled with the unroll.
- *burn-in* (``actor.burn_in`` rows, Kapturowski et al. 2019, R2D2): the rows before row 0 travel too, and are unrolled
  without gradient by the weights of the update. Every step is still trained exactly once.
- *refreshed* (``learner.refresh_states``): after each update the whole unroll is run again with the new weights, and
  the slot's next unroll starts from that state. No row travels twice, but after an unroll that was lost or dropped
  the next one starts from its stored state.
"""

# T time, B segments, C burn-in rows, L layers

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from shoal.learner.device import DevicePath
from shoal.policy.core import Core
from shoal.policy.memory import with_zeros
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.resets import State, plan_resets
from tensordict import TensorDict
from torch import Tensor


def stored_state(core: Core, batch: TensorDict, when: str = "initial") -> State:
    """Each tensor of the state, [L, B, ...], of columns ``<when>_<name>``."""
    return tuple(batch[f"{when}_{name}"].transpose(0, 1).contiguous() for name in core.state_shapes)


def memory_resets(batch: TensorDict) -> Tensor:
    """bool [B, T + 1]: rows before which the memory is zeroed; the network's ``is_first``."""
    resets: Tensor = batch.get("memory_reset", batch["is_first"])
    return resets


def with_state(core: Core, batch: TensorDict, state: State) -> TensorDict:
    """The batch with other initial states; everything else is shared."""
    changed = batch.copy()
    for name, part in zip(core.state_shapes, state, strict=True):
        changed[f"initial_{name}"] = part.transpose(0, 1)
    return changed


@torch.no_grad()
def burned_in(policy: RecurrentPolicy, batch: TensorDict, path: DevicePath) -> State:
    """The state before row 0, from the C rows before it."""
    state = stored_state(policy.core, batch, "burn_in")
    return _run(policy, batch["burn_in_obs"], batch["burn_in_is_first"], state, path)


@torch.no_grad()
def final_state(policy: RecurrentPolicy, batch: TensorDict, path: DevicePath) -> State:
    """The state before row T, from which the slot's next unroll starts."""
    state = stored_state(policy.core, batch)
    return _run(policy, batch["obs"][:, :-1], memory_resets(batch)[:, :-1], state, path)


def _run(policy: RecurrentPolicy, obs: Tensor, is_first: Tensor, state: State, path: DevicePath) -> State:
    plan = plan_resets(is_first.T.cpu().numpy()).to(path.device)
    with path.autocast():
        _, final = policy.unroll(obs.transpose(0, 1), is_first.T, state, plan=plan)
    assert final is not None
    return tuple(part.to(before.dtype) for part, before in zip(final, state, strict=True))


class RefreshedStates:
    """The state after the last trained unroll of every slot, made by the weights after that unroll's update."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._row_of: dict[int, int] = {}
        self._unroll = torch.empty(0, dtype=torch.int64)
        self._state = core.initial_state(0)

    def apply(self, batch: TensorDict) -> TensorDict:
        """The batch, starting from the kept state wherever the slot's last trained unroll is the one before."""
        rows = self._rows(batch)
        follows = self._unroll[rows] + 1 == batch["unroll_index"].cpu()
        if not follows.any():
            return batch
        state = []
        for kept, stored in zip(self._state, stored_state(self._core, batch), strict=True):
            keep = follows.to(kept.device).view(-1, *[1] * (kept.dim() - 2))
            state.append(torch.where(keep, kept[:, rows], stored))
        return with_state(self._core, batch, tuple(state))

    def keep(self, batch: TensorDict, state: State) -> None:
        """Keep ``state``, each [L, B, ...], as the state before row T of each segment."""
        rows = self._rows(batch)
        self._unroll[rows] = batch["unroll_index"].cpu()
        for kept, part in zip(self._state, state, strict=True):
            kept[:, rows] = part

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data for a checkpoint."""
        parts = dict(zip(self._core.state_shapes, self._state, strict=True))
        return {"training_env_ids": list(self._row_of), "unroll": self._unroll, "state": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``, where unrolls are counted on."""
        self._row_of = {env_id: row for row, env_id in enumerate(state["training_env_ids"])}
        self._unroll = state["unroll"].cpu()
        parts = zip(self._core.state_shapes, self._state, strict=True)
        self._state = tuple(state["state"][name].to(part.device) for name, part in parts)

    def _rows(self, batch: TensorDict) -> Tensor:
        """The table's row of every segment, int64 [B]; a new id gets a new row."""
        ids = batch["training_env_id"].tolist()
        rows = torch.tensor([self._row_of.setdefault(env_id, len(self._row_of)) for env_id in ids])
        if missing := len(self._row_of) - len(self._unroll):
            self._unroll = torch.nn.functional.pad(self._unroll, (0, missing), value=-2)  # followed by no unroll
            self._state = tuple(with_zeros(part, missing) for part in self._state)
        return rows


class StalenessProbe:
    """Measures, on a few segments of every ``every``-th update, how far states are from those of the newest weights.

    The reference is the state after the slot's previous unroll, run again as a whole with the weights that are about to
    be trained. The measure is ||state - reference|| / ||reference|| over the whole state, averaged over segments.
    """

    def __init__(self, path: DevicePath, *, every: int = 16, segments: int = 8) -> None:
        self._path, self._every, self._segments = path, every, segments
        self._calls = 0
        self._held: TensorDict | None = None

    def measure(self, policy: RecurrentPolicy, batch: TensorDict, used: TensorDict) -> dict[str, float]:
        """Staleness of the ``stored`` states of ``batch`` and of the ``used`` ones; empty if none was compared."""
        found = self._compare(policy, batch, used) if self._held is not None else {}
        if self._calls % self._every == 0:
            begin = self._calls // self._every * self._segments % batch.shape[0]
            state = (f"initial_{name}" for name in policy.core.state_shapes)
            names = ("training_env_id", "unroll_index", "obs", "is_first", "memory_reset", *state)
            self._held = batch.select(*names, strict=False)[begin : begin + self._segments].clone()
        self._calls += 1
        return found

    def _compare(self, policy: RecurrentPolicy, batch: TensorDict, used: TensorDict) -> dict[str, float]:
        assert self._held is not None
        same = batch["training_env_id"][:, None] == self._held["training_env_id"]
        follows = same & (batch["unroll_index"][:, None] == self._held["unroll_index"] + 1)
        # A segment whose memory is zeroed first has no state that could be stale.
        now, before = (follows & ~memory_resets(batch)[:, :1]).nonzero(as_tuple=True)
        if not len(now):
            return {}
        reference = _flat(final_state(policy, self._held[before], self._path))
        self._held = None
        norm = reference.norm(dim=1).clamp_min(1e-8)
        return {
            name: float(((_flat(stored_state(policy.core, which[now])) - reference).norm(dim=1) / norm).mean())
            for name, which in (("stored", batch), ("used", used))
        }


def _flat(state: State) -> Tensor:
    """[B, numbers of the state]"""
    return torch.cat([part.transpose(0, 1).flatten(1) for part in state], 1)
