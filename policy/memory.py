"""Recurrent memory while acting: one detached LSTM state per ``training_env_id``. It is no part of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from shoal.policy.recurrent import LSTMState


class Memory:
    """(h, c), each [L, H], by ``training_env_id``; an id that was never written reads as zeros.

    A caller that always passes the same disjoint tuples of ids (a rollout worker passes one per group of its slots)
    reads and writes whole tensors: nothing is gathered or copied per id.
    """

    def __init__(self, num_layers: int, hidden: int) -> None:
        self.shape = (num_layers, hidden)
        self._blocks: list[tuple[tuple[int, ...], LSTMState]] = []
        """The blocks' ids are disjoint, and no block is empty."""

    def read(self, training_env_ids: Sequence[int]) -> LSTMState | None:
        """(h, c), each [L, B, H], in the order of the ids; None while no id has a state."""
        ids = tuple(training_env_ids)
        for known, state in self._blocks:
            if ids is known:  # the same tuple at every step of a rollout: nothing is done per id then
                return state
        if not self._blocks:
            return None
        for known, state in self._blocks:
            if ids == known:
                return state
        row_of = {env_id: row for row, env_id in enumerate(env_id for known, _ in self._blocks for env_id in known)}
        rows = [row_of.get(env_id, len(row_of)) for env_id in ids]
        h, c = (torch.cat([state[i] for _, state in self._blocks], 1) for i in (0, 1))
        return torch.nn.functional.pad(h, (0, 0, 0, 1))[:, rows], torch.nn.functional.pad(c, (0, 0, 0, 1))[:, rows]

    def write(self, training_env_ids: Sequence[int], state: LSTMState) -> None:
        """Keep ``state`` ((h, c), each [L, B, H]) for the ids, detached.

        Raises:
            ValueError: an id occurs twice, or B is not the number of ids.
        """
        ids = tuple(training_env_ids)
        if state[0].shape[1] != len(ids):
            raise ValueError(f"state has {state[0].shape[1]} rows for {len(ids)} training_env_ids")
        state = (state[0].detach(), state[1].detach())
        for i, (known, _) in enumerate(self._blocks):
            if ids is known:
                self._blocks[i] = (ids, state)
                return
        written = set(ids)
        if len(written) != len(ids):
            raise ValueError(f"training_env_ids must differ, got {ids}")
        self._drop(written)
        if ids:
            self._blocks.append((ids, state))

    def get(self) -> dict[int, LSTMState]:
        """A copy of every state: (h, c), each [L, H], by ``training_env_id``."""
        return {
            env_id: (h[:, row].clone(), c[:, row].clone())
            for ids, (h, c) in self._blocks
            for row, env_id in enumerate(ids)
        }

    def set(self, states: Mapping[int, LSTMState]) -> None:
        """Replace all memory by ``states``: (h, c), each [L, H], by ``training_env_id``.

        Raises:
            ValueError: a state has another shape.
        """
        for env_id, parts in states.items():
            if any(tuple(part.shape) != self.shape for part in parts):
                got = [tuple(part.shape) for part in parts]
                raise ValueError(f"state of training_env_id {env_id} must be (h, c) of {self.shape}, got {got}")
        self._blocks = []
        if states:
            h, c = (torch.stack([parts[i] for parts in states.values()], 1) for i in (0, 1))
            self.write(tuple(states), (h, c))

    def reset(self, training_env_ids: Sequence[int] | None = None) -> None:
        """Zero the states of these ids, or of all ids if None."""
        if training_env_ids is None:
            self._blocks = []
        else:
            self._drop(set(training_env_ids))

    def _drop(self, dropped: AbstractSet[int]) -> None:
        """Forget these ids; blocks that have none of them stay as they are."""
        blocks = []
        for ids, (h, c) in self._blocks:
            if not dropped.isdisjoint(ids):
                rows = [row for row, env_id in enumerate(ids) if env_id not in dropped]
                ids, h, c = tuple(ids[row] for row in rows), h[:, rows], c[:, rows]
            if ids:
                blocks.append((ids, (h, c)))
        self._blocks = blocks
