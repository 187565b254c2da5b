"""The mailbox: trajectories that wait for their update, in the order in which they came."""

from __future__ import annotations

from collections import deque

from shoal.policy.trajectory import Trajectory, TrajectoryHeader


class Mailbox:
    """Trajectories, each once; it holds no lock (``learner.trajectory_queue`` has one for all its parts)."""

    def __init__(self) -> None:
        self._waiting: deque[Trajectory] = deque()
        self._next_sequence: dict[tuple[int, int], int] = {}
        """The lowest sequence number that is new, by actor and restart index."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def is_duplicate(self, header: TrajectoryHeader) -> bool:
        """Whether this trajectory, or a later one of the same actor process, was put in before."""
        return header.sequence < self._next_sequence.get((header.actor, header.restart_index), 0)

    def put(self, trajectory: Trajectory) -> None:
        """Append a trajectory that is no duplicate."""
        header = trajectory.header
        self._next_sequence[header.actor, header.restart_index] = header.sequence + 1
        self.num_bytes += trajectory.num_bytes
        self._waiting.append(trajectory)

    def take(self, count: int) -> list[Trajectory]:
        """Take the oldest ``count`` trajectories.

        Raises:
            IndexError: there are fewer.
        """
        taken = [self._waiting.popleft() for _ in range(count)]
        self.num_bytes -= sum(trajectory.num_bytes for trajectory in taken)
        return taken

    def take_older(self, policy_version: int) -> list[Trajectory]:
        """Take all trajectories that were made with versions below ``policy_version``."""
        older = [t for t in self._waiting if t.header.policy_version < policy_version]
        if older:
            self._waiting = deque(t for t in self._waiting if t.header.policy_version >= policy_version)
            self.num_bytes -= sum(trajectory.num_bytes for trajectory in older)
        return older

    def actors(self) -> list[int]:
        """The actor of every waiting trajectory."""
        return [trajectory.header.actor for trajectory in self._waiting]
