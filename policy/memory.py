"""Memory while acting: one detached LSTM state per ``training_env_id``. Never part of a weight checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


class Memory:
    """(h, c), each [L, H], by ``training_env_id``; an id that was never written reads as zeros.

    A caller that always passes the same ids in the same order (a rollout worker) gets and gives whole tensors: nothing
    is gathered or copied per id.
    """

    def __init__(self, num_layers: int, hidden: int) -> None:
        self._num_layers, self._hidden = num_layers, hidden
        self._ids: tuple[int, ...] = ()
        self._state: State | None = None

    def read(self, training_env_ids: Sequence[int]) -> State | None:
        """(h, c), each [L, B, H], in the order of the ids; None where none of them has a state."""
        ids = tuple(training_env_ids)
        if ids is self._ids or ids == self._ids or self._state is None:
            return self._state
        row_of = {env_id: row for row, env_id in enumerate(self._ids)}
        rows = [row_of.get(env_id, len(self._ids)) for env_id in ids]
        return tuple(torch.nn.functional.pad(part, (0, 0, 0, 1))[:, rows] for part in self._state)  # type: ignore[return-value]

    def write(self, training_env_ids: Sequence[int], state: State) -> None:
        """Keep ``state`` ((h, c), each [L, B, H]) for the ids, detached."""
        ids = tuple(training_env_ids)
        if state[0].shape[1] != len(ids):
            raise ValueError(f"state has {state[0].shape[1]} rows for {len(ids)} training_env_ids")
        state = (state[0].detach(), state[1].detach())
        if ids is not self._ids:  # the same tuple at every step of a rollout: nothing is done per id then
            written = set(ids)
            if len(written) != len(ids):
                raise ValueError(f"training_env_ids must differ, got {ids}")
            others = tuple(env_id for env_id in self._ids if env_id not in written)
            if others and (kept := self.read(others)) is not None:
                state = (torch.cat([state[0], kept[0]], 1), torch.cat([state[1], kept[1]], 1))
                ids += others
        self._ids, self._state = ids, state

    def get(self) -> dict[int, State]:
        """Every state, copied."""
        if self._state is None:
            return {}
        h, c = self._state
        return {env_id: (h[:, row].clone(), c[:, row].clone()) for row, env_id in enumerate(self._ids)}

    def set(self, states: Mapping[int, State]) -> None:
        """Replace everything by ``states``."""
        shape = (self._num_layers, self._hidden)
        for env_id, parts in states.items():
            if any(tuple(part.shape) != shape for part in parts):
                got = [tuple(part.shape) for part in parts]
                raise ValueError(f"state of training_env_id {env_id} must be (h, c) of {shape}, got {got}")
        self._ids, self._state = (), None
        if states:
            h, c = (torch.stack([parts[i] for parts in states.values()], 1) for i in (0, 1))
            self.write(tuple(states), (h, c))

    def reset(self, training_env_ids: Sequence[int] | None = None) -> None:
        """Zero these ids' states; None forgets all."""
        if training_env_ids is None:
            self._ids, self._state = (), None
            return
        drop = set(training_env_ids)
        keep = {env_id: state for env_id, state in self.get().items() if env_id not in drop}
        self.set(keep)
