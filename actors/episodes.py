"""Returns and lengths of finished episodes, counted for all slots at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class EpisodeCounter:
    """Sums rewards and steps per slot from one episode's first valid transition to its end.

    Reset transitions (masked) are counted nowhere. An episode that was cut off by a fault, or that began with a shorter
    time limit so that slots do not end together, is no finished episode.
    """

    def __init__(self, num_slots: int) -> None:
        self._return = np.zeros(num_slots, np.float64)
        self._length = np.zeros(num_slots, np.int64)
        self._returns: list[float] = []
        self._lengths: list[int] = []

    def add(
        self,
        reward: np.ndarray,
        is_first: np.ndarray,
        ended: np.ndarray,
        short: np.ndarray,
        slots: slice = slice(None),
    ) -> None:
        """One step of B slots: ``reward`` float [B]; ``is_first`` (of the next row), ``ended`` and ``short`` bool [B].

        ``slots`` selects them among all slots. ``short`` marks an episode that began with a shorter time limit.
        """
        returns, lengths = self._return[slots], self._length[slots]
        returns += reward
        lengths += 1
        # An end with is_first in the same step belongs to its own episode; is_first alone is a reset transition.
        finished = ended & ~short
        if finished.any():
            self._returns += returns[finished].tolist()
            self._lengths += lengths[finished].tolist()
        if is_first.any():
            returns[is_first] = 0.0
            lengths[is_first] = 0

    def get_state(self) -> dict[str, np.ndarray]:
        """Sums of the episodes in progress; finished ones are not part of it."""
        return {"return": self._return.copy(), "length": self._length.copy()}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from ``get_state``."""
        self._return[:], self._length[:] = state["return"], state["length"]

    def drain(self) -> dict[str, list[float] | list[int]]:
        """Returns and lengths of the episodes finished since the last call."""
        finished: dict[str, list[float] | list[int]] = {
            "episode_returns": self._returns,
            "episode_lengths": self._lengths,
        }
        self._returns, self._lengths = [], []
        return finished
