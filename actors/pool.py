"""Who runs the rollout workers: what a pool needs of the learner's side, and the pool that runs them in this process.

A pool is a producer that never ends by itself. It asks its ``Feed`` before every unroll, so that a slow learner makes
actors wait instead of making data nobody can use. ``actors.ray_pool`` runs the workers as Ray actors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

import numpy as np

from actors.agent import WorkerSetup


class Feed(Protocol):
    """What a pool needs of the learner's side."""

    def admit(self, actor: int) -> Any | None:
        """The newest weights if this actor may start an unroll now, else None. What is admitted is under way."""

    def deliver(self, payload: np.ndarray) -> None:
        """Hand over a finished unroll's bytes."""

    def abandon(self, actor: int) -> None:
        """An admitted unroll of this actor will never be delivered."""


class InlinePool:
    """Rollout workers in this process, one after the other: deterministic, and steps into a debugger."""

    def __init__(self, setup: WorkerSetup, num_actors: int, feed: Feed) -> None:
        self._feed = feed
        self._workers = [setup.make_worker(actor, 0) for actor in range(num_actors)]
        self.restarts: Counter[str] = Counter()

    @property
    def num_alive(self) -> int:
        """Workers that can make unrolls."""
        return len(self._workers)

    def pump(self, timeout: float) -> None:
        """One unroll of every worker that is admitted."""
        for actor, worker in enumerate(self._workers):
            weights = self._feed.admit(actor)
            if weights is not None:
                self._feed.deliver(worker.rollout(weights))

    def close(self) -> None:
        """Close all environments."""
        for worker in self._workers:
            worker.close()
