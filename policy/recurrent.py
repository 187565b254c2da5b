"""A reset-aware LSTM unroll: what stepping with the state zeroed at ``is_first`` gives, in whole-sequence calls.

T time, B rows, K final rows, I inputs, H hidden, L layers. A *fragment* is a run of one row without a reset inside. A
*final row* is consumed after a step and before the reset that follows it: the last observation of an episode that ended
in the same-step form. Its output counts, no later step sees it. Two kernels, both equal to the step-by-step reference
(tests/test_recurrent.py):

- fragments in length buckets (CPU training): fragments sorted by length are run a bucket at a time, padded at the end
  to the bucket's longest. Padding comes after the last real step, so it never reaches an output that is used; but it
  does reach the final state.
- PackedSequence (accelerators, or when the final state is wanted): exact final states, slow on CPUs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

MAX_BUCKETS = 4
# A bucket's step costs about as much as this many more rows would, so buckets that save little are not opened.
STEP_COST_IN_ROWS = 8

State = tuple[Tensor, Tensor]
"""(h, c), each [L, B, H]."""


class Bucket(NamedTuple):
    """Fragments run in one call, padded to ``length`` steps."""

    length: int
    gather: Tensor
    """[length * rows] int64 into the T * B time-major steps and the K final rows behind them; padding points at the
    fragment's own last one."""
    source_row: Tensor
    """[rows] int64: the row whose initial state the fragment starts from, or B for zeros."""


@dataclasses.dataclass(frozen=True, slots=True)
class FragmentPlan:
    """How the rows of one [T, B] segment batch are cut at their resets; depends on ``is_first`` alone."""

    buckets: tuple[Bucket, ...]
    """Empty where no row has a reset after its first step: the batch is run whole."""
    scatter: Tensor
    """[T * B + K] int64: where each step and final row lies in the buckets' concatenated outputs."""
    lengths: Tensor
    """[fragments] int64 on the CPU, in the order of the buckets' fragments."""
    last_of_row: Tensor
    """[B] int64: the fragment that holds row b's last step."""

    def to(self, device: torch.device) -> FragmentPlan:
        """The same plan with its indices on ``device``."""
        buckets = tuple(Bucket(b.length, b.gather.to(device), b.source_row.to(device)) for b in self.buckets)
        return dataclasses.replace(
            self, buckets=buckets, scatter=self.scatter.to(device), last_of_row=self.last_of_row.to(device)
        )


def plan_fragments(
    is_first: np.ndarray, final: tuple[np.ndarray, np.ndarray] | None = None, max_buckets: int = MAX_BUCKETS
) -> FragmentPlan:
    """Cut a batch at its resets and bucket the fragments by length.

    ``is_first`` is bool [T, B] on the host. Row 0's flag cuts nothing (a fragment starts there anyway); it decides only
    whether that fragment starts from the stored state or from zeros, as ``is_first`` does for all others. ``final`` are
    the K final rows as (t [K], b [K]): consumed after step (t, b), where ``is_first[t + 1, b]`` is set.
    """
    steps, rows = is_first.shape
    starts = is_first.copy()
    starts[0] = True
    row_of, start_of = np.nonzero(starts.T)  # ordered by row, then time
    end_of = np.append(start_of[1:], steps)
    end_of[np.append(row_of[1:] != row_of[:-1], True)] = steps
    length_of = end_of - start_of
    # A final row lengthens the fragment that it ends; -1 where there is none.
    final_of = np.full(len(row_of), -1, dtype=np.int64)
    if final is not None and len(final[0]):
        fragment_at = np.empty((rows, steps + 1), dtype=np.int64)
        fragment_at[row_of, end_of] = np.arange(len(row_of))
        final_of[fragment_at[final[1], final[0] + 1]] = steps * rows + np.arange(len(final[0]))
        length_of = length_of + (final_of >= 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    if len(row_of) == rows:
        return FragmentPlan((), nothing, nothing, nothing)

    order = np.argsort(-length_of, kind="stable")
    row_of, start_of, length_of, final_of = row_of[order], start_of[order], length_of[order], final_of[order]
    is_end = end_of[order] == steps
    zero_start = (start_of > 0) | is_first[0, row_of]
    buckets = []
    scatter = np.empty(steps * rows + np.count_nonzero(final_of >= 0), dtype=np.int64)
    offset = 0
    for begin, end in _choose_buckets(length_of, max_buckets):
        longest, count = int(length_of[begin]), end - begin
        time = np.arange(longest)[:, None]
        inside = time < length_of[begin:end]
        last = length_of[begin:end] - 1
        step = (start_of[begin:end] + np.minimum(time, last)) * rows + row_of[begin:end]
        step = np.where((time >= last) & (final_of[begin:end] >= 0), final_of[begin:end], step)
        scatter[step[inside]] = (offset + np.arange(longest * count).reshape(longest, count))[inside]
        source = np.where(zero_start[begin:end], rows, row_of[begin:end])
        buckets.append(Bucket(longest, torch.from_numpy(step.ravel()), torch.from_numpy(source)))
        offset += longest * count
    last_of_row = np.empty(rows, dtype=np.int64)
    last_of_row[row_of[is_end]] = np.nonzero(is_end)[0]
    return FragmentPlan(
        tuple(buckets), torch.from_numpy(scatter), torch.from_numpy(length_of), torch.from_numpy(last_of_row)
    )


def _choose_buckets(lengths: np.ndarray, max_buckets: int) -> list[tuple[int, int]]:
    """[begin, end) ranges over ``lengths`` (descending) that minimise sum of longest x (rows + overhead); exact."""
    # Only between different lengths is it worth cutting.
    cuts = np.concatenate([[0], np.nonzero(np.diff(lengths))[0] + 1, [len(lengths)]])
    longest = lengths[cuts[:-1]]
    n = len(longest)
    # cost[i, j]: one bucket over the distinct lengths i..j-1
    count = cuts[None, :] - cuts[:-1, None]
    cost = np.where(count > 0, longest[:, None] * (count + STEP_COST_IN_ROWS), np.inf)
    best = np.full((max_buckets + 1, n + 1), np.inf)
    best[:, 0] = 0.0
    choice = np.zeros((max_buckets + 1, n + 1), dtype=np.int64)
    for k in range(1, max_buckets + 1):
        total = best[k - 1, :-1, None] + cost
        choice[k] = total.argmin(0)
        best[k] = np.minimum(total.min(0), best[k - 1])
        choice[k] = np.where(best[k] < best[k - 1], choice[k], choice[k - 1])
        best[k, 0] = 0.0
    ranges = []
    j, k = n, max_buckets
    while j > 0:
        i = int(choice[k, j])
        ranges.append((int(cuts[i]), int(cuts[j])))
        j, k = i, k - 1
    return ranges[::-1]


def step_lstm(lstm: nn.LSTM, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
    """One step: x [B, I], is_first bool [B], state [L, B, H] -> output [B, H], new state."""
    keep = ~is_first.view(1, -1, 1)
    # where, not a product: a non-finite state of an episode that ended must not survive as 0 * inf.
    h, c = (torch.where(keep, part, 0.0) for part in state)
    # Cell by cell: for one step nn.LSTM spends half its time on preparing weights for more.
    layers = []
    for layer, parameters in enumerate(lstm.all_weights):
        layers.append(torch.lstm_cell(x, (h[layer], c[layer]), *parameters))
        x = layers[-1][0]
    return x, (torch.stack([h for h, _ in layers]), torch.stack([c for _, c in layers]))


def unroll_lstm(
    lstm: nn.LSTM, x: Tensor, plan: FragmentPlan, first: Tensor, state: State, *, return_state: bool
) -> tuple[Tensor, State | None]:
    """T steps of B rows from ``state`` [L, B, H]: outputs [T * B + K, H], the state after the last step (if wanted).

    ``x`` [T * B + K, I] holds the steps in time-major order and the final rows behind them; the outputs likewise.
    ``plan`` is that of ``is_first`` [T, B], ``first`` its row 0 (bool [B]) on x's device.
    """
    rows = len(first)
    if not plan.buckets:
        keep = ~first.view(1, -1, 1)
        y, final = lstm(x.view(-1, rows, x.shape[1]), tuple(torch.where(keep, part, 0.0) for part in state))
        return y.flatten(0, 1), final if return_state else None
    h, c = (nn.functional.pad(part, (0, 0, 0, 1)) for part in state)  # row B: the zeros of a reset
    if return_state or x.device.type != "cpu":
        return _unroll_packed(lstm, x, plan, (h, c), return_state)
    outputs = []
    for length, gather, source_row in plan.buckets:
        fragments = x.index_select(0, gather).view(length, -1, x.shape[1])
        y, _ = lstm(fragments, (h.index_select(1, source_row), c.index_select(1, source_row)))
        outputs.append(y.reshape(-1, y.shape[-1]))
    return torch.cat(outputs).index_select(0, plan.scatter), None


def _unroll_packed(
    lstm: nn.LSTM, x: Tensor, plan: FragmentPlan, state: State, return_state: bool
) -> tuple[Tensor, State | None]:
    # Every fragment padded to the longest of all; the buckets' own paddings are cut to that common shape.
    longest = plan.buckets[0].length
    columns = [b.gather.view(b.length, -1) for b in plan.buckets]
    padded = torch.cat([torch.cat([g, g[-1:].expand(longest - len(g), -1)]) for g in columns], 1)
    source_row = torch.cat([b.source_row for b in plan.buckets])
    packed = pack_padded_sequence(x[padded], plan.lengths)  # lengths are already in descending order
    y_packed, (h, c) = lstm(packed, (state[0].index_select(1, source_row), state[1].index_select(1, source_row)))
    y, _ = pad_packed_sequence(y_packed)
    inside = torch.arange(longest, device=x.device)[:, None] < plan.lengths.to(x.device)
    out = torch.empty(len(x), y.shape[-1], device=y.device, dtype=y.dtype)
    out = out.index_copy(0, padded[inside], y[inside])
    # A row's last fragment ends at the unroll's end, so no final row is part of its state.
    final = (h.index_select(1, plan.last_of_row), c.index_select(1, plan.last_of_row)) if return_state else None
    return out, final
