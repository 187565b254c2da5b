"""A reset-aware LSTM unroll: equal to stepping with the state zeroed at ``is_first``, but one call per layer.

T time, B rows, S slots in time, K final rows, I inputs, H hidden, L layers. Before every reset inside a row, one
step is inserted that empties the LSTM: an extra input drives the input, forget and output gates to exactly 0, so c, h
and every gradient through that step are 0. The rest of the row moves on by one slot, so the batch takes S >= T steps,
S = T + the largest number of resets in a row, without cuts or loops. (Stepping is used instead if resets nearly double
the steps of many rows.) Shorter rows are held at their end: the forget gate is exactly 1 and the input gate exactly 0,
so c does not change.

A *final row* is the last observation of an episode that ended in the same-step form. The LSTM consumes it after that
episode's last step and before the reset; its output is returned, and no later step depends on it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]
"""(h, c), each [L, B, H]."""

SATURATED = 2.0**14
"""sigmoid(-SATURATED + x) is exactly 0 for any realistic pre-activation x; every dtype represents this number."""
# With more inserted steps than this in that many rows, stepping is cheaper on a CPU in float32 (bench kernels).
LOOP_FROM, LOOP_ROWS = 1.7, 64
_EMPTY, _HOLD = (-1.0, -1.0, 0.0, -1.0), (-1.0, 1.0, 0.0, -1.0)
"""Signs added to the input, forget, cell and output gates by the two kinds of inserted steps."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResetPlan:
    """Slots of the steps of one [T, B] segment batch, with inserted steps for resets; a function of ``is_first``."""

    slots: int
    """S; 0 if no row has a reset after its first step, so that the batch runs unchanged."""
    place: Tensor
    """[T * B + K] int64: index into S * B of each step and final row, time-major."""
    inserted: Tensor
    """float32 [S, B, 2]: [..., 0] is 1 in steps that empty the LSTM, [..., 1] in steps that hold it."""
    last: Tensor
    """[B] int64: index into S * B of each row's last step."""
    final: Tensor
    """[K] int64: index into T * B of the step that each final row follows."""

    def to(self, device: torch.device) -> ResetPlan:
        """The same plan on ``device``."""
        return ResetPlan(self.slots, *(part.to(device) for part in (self.place, self.inserted, self.last, self.final)))


def plan_resets(is_first: np.ndarray, final: tuple[np.ndarray, np.ndarray] | None = None) -> ResetPlan:
    """Place a batch's steps around its resets.

    ``is_first`` is bool [T, B] on the host. Row 0's flag inserts nothing: it decides whether the row starts from the
    stored state or from zeros. ``final`` lists the K final rows as (t [K], b [K]): each is consumed after step (t, b)
    and requires ``is_first[t + 1, b]``.
    """
    steps, rows = is_first.shape
    # later[t, b] = slot[t, b] - t, the number of resets and final rows up to step t.
    later = is_first.astype(np.int64)
    later[0] = 0
    if not later.any():
        nothing = torch.zeros(0)
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


def zeroed(state: LSTMState, is_first: Tensor) -> LSTMState:
    """[L, B, H] with the rows of ``is_first`` [B] zeroed; masked, since NaN * 0 would stay NaN."""
    reset = is_first.view(1, -1, 1)
    return state[0].masked_fill(reset, 0.0), state[1].masked_fill(reset, 0.0)


def step_lstm(lstm: nn.LSTM, x: Tensor, is_first: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
    """One step: x [B, I], is_first bool [B], state [L, B, H] -> output [B, H], new state."""
    h, c = zeroed(state, is_first)
    # Cell by cell: for one step nn.LSTM spends half its time on preparing weights for more.
    layers = []
    for layer, parameters in enumerate(lstm.all_weights):
        layers.append(torch.lstm_cell(x, (h[layer], c[layer]), *parameters))
        x = layers[-1][0]
    return x, (torch.stack([h for h, _ in layers]), torch.stack([c for _, c in layers]))


def unroll_lstm(
    lstm: nn.LSTM, x: Tensor, plan: ResetPlan, is_first: Tensor, state: LSTMState, *, return_state: bool
) -> tuple[Tensor, LSTMState | None]:
    """T steps of B rows from ``state`` [L, B, H]: outputs [T * B + K, H], and the state after the last step.

    ``x`` [T * B + K, I] holds the steps in time-major order and the final rows behind them; the outputs likewise.
    ``plan`` was made from ``is_first``, bool [T, B] on x's device. The returned state may be None unless
    ``return_state`` is set.
    """
    steps, rows = is_first.shape
    if plan.slots > LOOP_FROM * steps and rows >= LOOP_ROWS and x.dtype != torch.bfloat16 and x.device.type == "cpu":
        return _loop(lstm, x, plan, is_first, state)
    state = zeroed(state, is_first[0])
    if not plan.slots:
        y, last = lstm(x.view(-1, rows, x.shape[1]), state)
        return y.flatten(0, 1), last if return_state else None
    y = x.new_zeros(plan.slots * rows, x.shape[1]).index_copy(0, plan.place, x).view(plan.slots, rows, -1)
    inserted = plan.inserted.to(x.dtype)
    # [4 H, 2]
    gates = SATURATED * torch.tensor((_EMPTY, _HOLD), device=x.device).T.repeat_interleave(lstm.hidden_size, 0)
    outputs, cells = [], []
    for layer, (w_ih, *others) in enumerate(lstm.all_weights):
        weights = [torch.cat([w_ih, gates.to(w_ih.dtype)], 1), *others]
        start = [part[layer : layer + 1] for part in state]
        x = torch.cat([y, inserted], 2)
        y, _, c = torch.lstm(x, start, weights, True, 1, 0.0, lstm.training, False, False)
        outputs.append(y.flatten(0, 1))
        cells.append(c)
    last_state = None
    if return_state:
        last_state = (torch.stack([h.index_select(0, plan.last) for h in outputs]), torch.cat(cells))
    return outputs[-1].index_select(0, plan.place), last_state


def _loop(lstm: nn.LSTM, x: Tensor, plan: ResetPlan, is_first: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
    outputs, states = [], []
    for t, flags in enumerate(is_first):
        y, state = step_lstm(lstm, x[t * len(flags) : (t + 1) * len(flags)], flags, state)
        outputs.append(y)
        states.append(state)
    if len(plan.final):
        h, c = (torch.cat(parts, 1).index_select(1, plan.final) for parts in zip(*states, strict=True))
        none = is_first.new_zeros(len(plan.final))
        outputs.append(step_lstm(lstm, x[is_first.numel() :], none, (h, c))[0])
    return torch.cat(outputs), state
