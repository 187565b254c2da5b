"""Where a segment's resets and final rows lie: the plan by which a core unrolls a whole segment at once.

T time, B rows, S slots in time, K final rows. Before every reset inside a row, one step is inserted that empties the
state. The rest of the row moves on by one slot, so the batch takes S >= T steps, S = T + the largest number of resets
in a row, without cuts or loops. Shorter rows are held at their end. How to empty and hold a state is the core's affair
(``policy.lstm``).

A *final row* is the last observation of an episode that ended in the same-step form. The core consumes it after that
episode's last step; its output is returned, and no later step depends on it. With a reset after it, which empties what
it left in the state, it has a slot of its own. Where the memory is carried on without one, there is no such slot: the
segment is stepped through, and the final rows step from a copy of the state.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""The state of B environments, in the order of the core's ``state_shapes``; each [L, B, ...]: layers, then rows."""

SATURATED = 2.0**14
"""sigmoid(-SATURATED + x) is exactly 0 for any realistic pre-activation x; every dtype represents this number."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResetPlan:
    """Slots of the steps of one [T, B] segment batch, with inserted steps for resets; a function of ``is_first``."""

    slots: int
    """S; 0 if no row has a reset after its first step, so that the batch runs unchanged."""
    place: Tensor
    """[T * B + K] int64: index into S * B of each step and final row, time-major."""
    inserted: Tensor
    """float32 [S, B, 2]: [..., 0] is 1 in steps that empty the state, [..., 1] in steps that hold it."""
    last: Tensor
    """[B] int64: index into S * B of each row's last step."""
    final: Tensor
    """[K] int64: index into T * B of the step that each final row follows."""
    is_stepped: bool = dataclasses.field(default=False, kw_only=True)
    """A final row is followed by no reset: only ``Core.unroll`` computes this plan, which has nothing but ``final``."""

    def to(self, device: torch.device) -> ResetPlan:
        """The same plan on ``device``."""
        parts = (part.to(device) for part in (self.place, self.inserted, self.last, self.final))
        return ResetPlan(self.slots, *parts, is_stepped=self.is_stepped)


def plan_resets(is_first: np.ndarray, final: tuple[np.ndarray, np.ndarray] | None = None) -> ResetPlan:
    """Place a batch's steps around its resets.

    ``is_first`` is bool [T, B] on the host. Row 0's flag inserts nothing: it decides whether the row starts from the
    stored state or from zeros. ``final`` lists the K final rows as (t [K], b [K]): each is consumed after step (t, b).
    """
    steps, rows = is_first.shape
    nothing = torch.zeros(0)
    if final is not None and not is_first[final[0] + 1, final[1]].all():
        return ResetPlan(0, nothing, nothing, nothing, torch.from_numpy(final[0] * rows + final[1]), is_stepped=True)
    # later[t, b] = slot[t, b] - t, the number of resets and final rows up to step t.
    later = is_first.astype(np.int64)
    later[0] = 0
    if not later.any():
        return ResetPlan(0, nothing, nothing, nothing, nothing)
    empty_t, empty_b = np.nonzero(later)
    final_t, final_b = final if final is not None else (empty_t[:0], empty_b[:0])
    later[final_t + 1, final_b] += 1
    later = later.cumsum(0)
    slot = np.arange(steps)[:, None] + later
    slots = steps + int(later[-1].max())
    inserted = np.zeros((slots, rows, 2), np.float32)
    inserted[slot[empty_t, empty_b] - 1, empty_b, 0] = 1.0
    inserted[..., 1] = np.arange(slots)[:, None] > slot[-1]
    place = slot * rows + np.arange(rows)
    # A final row lies between its step and the emptying.
    every = np.concatenate([place.ravel(), (slot[final_t, final_b] + 1) * rows + final_b])
    return ResetPlan(
        slots, *(torch.from_numpy(part) for part in (every, inserted, place[-1], final_t * rows + final_b))
    )


def zeroed(state: State, is_first: Tensor) -> State:
    """[L, B, ...] with the rows of ``is_first`` [B] zeroed; masked, since NaN * 0 would stay NaN."""
    return tuple(part.masked_fill(is_first.view(1, -1, *[1] * (part.dim() - 2)), 0.0) for part in state)
