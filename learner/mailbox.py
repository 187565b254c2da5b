"""The mailbox: trajectories that wait for their update, in the order in which their unrolls began."""

from __future__ import annotations

import bisect
from typing import NamedTuple

from shoal.policy.trajectory import Trajectory, TrajectoryHeader


class Place(NamedTuple):
    """The place of a trajectory among those that wait."""

    order: tuple[int, int]
    """Policy version and number of the admission: the lowest is trained first."""
    latest_version: int | None
    """The last policy version that it may be trained at; None for any."""


class Mailbox:
    """Trajectories, each once; it holds no lock (``learner.trajectory_queue`` has one for all its parts)."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Place, Trajectory]] = []
        self._next_sequence: dict[tuple[int, int], int] = {}
        """The lowest sequence number that is new, by actor and restart index."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def is_duplicate(self, header: TrajectoryHeader) -> bool:
        """Whether this trajectory, or a later one of the same actor process, was put in before."""
        return header.sequence < self._next_sequence.get((header.actor, header.restart_index), 0)

    def put(self, place: Place, trajectory: Trajectory) -> None:
        """Put a trajectory that is no duplicate into its place."""
        header = trajectory.header
        self._next_sequence[header.actor, header.restart_index] = header.sequence + 1
        self.put_back(place, trajectory)

    def waiting(self) -> list[tuple[Place, Trajectory]]:
        """All that waits, in order."""
        return list(self._waiting)

    def put_back(self, place: Place, trajectory: Trajectory) -> None:
        """Put what waited in an earlier session of the run, whose actors it is not counted for, into its place."""
        self.num_bytes += trajectory.num_bytes
        bisect.insort(self._waiting, (place, trajectory), key=lambda waiting: waiting[0].order)

    def take(self, count: int) -> list[Trajectory]:
        """Take the first ``count`` trajectories; all of them where there are fewer."""
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return self._taken(taken)

    def take_stale(self, policy_version: int) -> list[Trajectory]:
        """Take all trajectories that may not be trained at ``policy_version`` any more."""
        latest = [place.latest_version for place, _ in self._waiting]
        stale = [version is not None and version < policy_version for version in latest]
        if not any(stale):
            return []
        taken = [waiting for waiting, too_old in zip(self._waiting, stale, strict=True) if too_old]
        self._waiting = [waiting for waiting, too_old in zip(self._waiting, stale, strict=True) if not too_old]
        return self._taken(taken)

    def _taken(self, waiting: list[tuple[Place, Trajectory]]) -> list[Trajectory]:
        self.num_bytes -= sum(trajectory.num_bytes for _, trajectory in waiting)
        return [trajectory for _, trajectory in waiting]
