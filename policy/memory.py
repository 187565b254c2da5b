"""Recurrent memory while acting: one detached state per ``training_env_id``. It is no part of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from shoal.policy.resets import State
from torch import Tensor


class Memory:
    """The core's state, each tensor [L, ...], by ``training_env_id``; an id that was never written reads as zeros.

    A caller that always passes the same disjoint tuples of ids (a rollout worker passes one per group of its slots)
    reads and writes whole tensors: nothing is gathered or copied per id.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[tuple[int, ...], State]] = []
        """The blocks' ids are disjoint, and no block is empty."""

    def read(self, training_env_ids: Sequence[int]) -> State | None:
        """The state, each [L, B, ...], in the order of the ids; None while no id has a state."""
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
        joined = (torch.cat(parts, 1) for parts in zip(*(state for _, state in self._blocks), strict=True))
        return tuple(with_zeros(part, 1)[:, rows] for part in joined)

    def write(self, training_env_ids: Sequence[int], state: State) -> None:
        """Keep ``state`` (each [L, B, ...]) for the ids, detached.

        Raises:
            ValueError: an id occurs twice, or B is not the number of ids.
        """
        ids = tuple(training_env_ids)
        if state[0].shape[1] != len(ids):
            raise ValueError(f"state has {state[0].shape[1]} rows for {len(ids)} training_env_ids")
        state = tuple(part.detach() for part in state)
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

    def get(self) -> dict[int, State]:
        """A copy of every state, each [L, ...], by ``training_env_id``."""
        return {
            env_id: tuple(part[:, row].clone() for part in state)
            for ids, state in self._blocks
            for row, env_id in enumerate(ids)
        }

    def set(self, states: Mapping[int, State]) -> None:
        """Replace all memory by ``states``, each tensor [L, ...], by ``training_env_id``."""
        self._blocks = []
        if states:
            self.write(tuple(states), tuple(torch.stack(parts, 1) for parts in zip(*states.values(), strict=True)))

    def reset(self, training_env_ids: Sequence[int] | None = None) -> None:
        """Zero the states of these ids, or of all ids if None."""
        if training_env_ids is None:
            self._blocks = []
        else:
            self._drop(set(training_env_ids))

    def _drop(self, dropped: AbstractSet[int]) -> None:
        """Forget these ids; blocks that have none of them stay as they are."""
        blocks = []
        for ids, state in self._blocks:
            if not dropped.isdisjoint(ids):
                rows = [row for row, env_id in enumerate(ids) if env_id not in dropped]
                ids, state = tuple(ids[row] for row in rows), tuple(part[:, rows] for part in state)
            if ids:
                blocks.append((ids, state))
        self._blocks = blocks


def with_zeros(part: Tensor, rows: int) -> Tensor:
    """[L, B, ...] with so many rows of zeros behind the others."""
    return torch.nn.functional.pad(part, (*[0, 0] * (part.dim() - 2), 0, rows))
