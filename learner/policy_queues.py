"""The queues of several policies behind one pool: an unroll of an actor has a trajectory for each of them.

One admission decides for all. It is that of the policy which is updated last, whose batch waits longest: what it admits
is within the lag of the others, too. A delivery is taken by all queues or by none, so that each has the same unrolls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from shoal.learner.trajectory_queue import TrajectoryQueue, log_refused
from shoal.policy.trajectory import Trajectory, TrajectoryError


class PolicyQueues:
    """``actors.pool.TrajectorySink`` for a pool of ``actors.teams.TeamWorker``.

    Args:
        queues: by policy, in the order in which they are updated, which is that of an unroll's trajectories.
    """

    def __init__(self, queues: Mapping[str, TrajectoryQueue]) -> None:
        self._by_policy = dict(queues)
        *self._others, self._last = self._all = tuple(queues.values())

    def admit(self, idle: Sequence[int]) -> tuple[int, Any] | None:
        """Choose one of the idle actors: (actor, the newest weights of every policy); None where none may start."""
        admitted = self._last.admit(idle)
        if admitted is None:
            return None
        actor, weights = admitted
        return actor, (*(queue.follow(actor) for queue in self._others), weights)

    def deliver(self, actor: int, payload: Sequence[np.ndarray]) -> str | None:
        """Hand over the trajectories (uint8) of a finished unroll; why they are refused, None where they are taken."""
        try:
            read = self._read(payload)
        except TrajectoryError as error:
            for queue in self._all:
                queue.refuse(actor)
            why: str | None = str(error)
        else:
            refused = [queue.take(actor, trajectory) for queue, trajectory in zip(self._all, read, strict=True)]
            why = next((each for each in refused if each is not None), None)
        if why is not None:
            log_refused(why)
        return why

    def _read(self, payload: Sequence[np.ndarray]) -> list[Trajectory]:
        if len(payload) != len(self._all):
            raise TrajectoryError(f"expected a trajectory for each of {len(self._all)} policies, got {len(payload)}")
        read = []
        for (policy, queue), part in zip(self._by_policy.items(), payload, strict=True):
            try:
                read.append(queue.read(part))
            except TrajectoryError as error:
                raise TrajectoryError(f"{policy}: {error}") from error
        return read

    def abandon(self, actor: int) -> None:
        """An admitted unroll of this actor will never be delivered."""
        for queue in self._all:
            queue.abandon(actor)

    def fail(self, error: BaseException) -> None:
        """The pool ended with ``error``: waiting for a batch raises it."""
        for queue in self._all:
            queue.fail(error)
