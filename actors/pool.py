"""The sink that a pool of rollout workers delivers to, and the pool that runs them in this process.

A pool is a producer that never ends by itself. It asks its ``TrajectorySink`` before every unroll, so that a slow
learner makes actors wait instead of making data nobody can use. ``actors.ray_pool`` runs the workers as Ray actors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter, deque
from typing import Any, Literal, Protocol

import numpy as np
from shoal.actors.worker_setup import WorkerSetup

log = logging.getLogger(__name__)

_RESTART_INDEX_BITS = 16
MOST_REPORTED = 100
"""Replacements kept until they are reported."""

ActorState = Literal["up", "starting", "unplaced", "pausing"]
"""The state of an actor. ``up``: it can make unrolls. ``starting``: its process makes policy and environments.
``unplaced``: it waits for a place in the cluster, or for its process to report its location. ``pausing``: it failed,
and its replacement starts after a pause."""


@dataclasses.dataclass(slots=True)
class Recoveries:
    """Number and duration of recoveries, each from the detection of a failure until the replacement is up."""

    count: int = 0
    seconds: float = 0.0
    """Sum over all recoveries."""
    slowest: float = 0.0
    """The longest recovery, in seconds."""

    def add(self, seconds: float) -> None:
        """Count one recovery."""
        self.count += 1
        self.seconds += seconds
        self.slowest = max(self.slowest, seconds)


class TrajectorySink(Protocol):
    """The learner's side of a pool: admits unrolls and takes finished ones."""

    def admit(self, actor: int) -> Any | None:
        """The newest weights if this actor may start an unroll now, else None. An admitted unroll is in flight."""

    def deliver(self, payload: np.ndarray) -> None:
        """Hand over a finished unroll's bytes."""

    def abandon(self, actor: int) -> None:
        """An admitted unroll of this actor will never be delivered."""


class InlinePool:
    """Rollout workers in this process, one after the other: deterministic, and steps into a debugger.

    Args:
        actors: their indices in the run.
        restart_index: how often the process that runs the pool was replaced before.
        max_consecutive_failures: of one worker, after which its error is raised; up to then it is replaced.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        actors: range,
        sink: TrajectorySink,
        *,
        restart_index: int = 0,
        max_consecutive_failures: int = 1,
    ) -> None:
        self._setup, self._sink, self._max_failures = setup, sink, max_consecutive_failures
        # Replacements in this process count on from those of the process.
        self._restart_indices = dict.fromkeys(actors, restart_index << _RESTART_INDEX_BITS)
        self._failures: Counter[int] = Counter()
        self._workers = {actor: setup.make_worker(actor, self._restart_indices[actor]) for actor in actors}
        self.replaced: deque[tuple[str, str]] = deque(maxlen=MOST_REPORTED)
        """The latest replacements as (reason label, message); whoever reports them may empty it."""
        self.restarts: Counter[str] = Counter()
        self.recoveries = Recoveries()

    @property
    def num_alive(self) -> int:
        """Workers that can make unrolls."""
        return len(self._workers)

    @property
    def states(self) -> Counter[ActorState]:
        """Number of workers by state."""
        return Counter({"up": len(self._workers)})

    def pump(self, timeout: float) -> None:
        """One unroll of every worker that is admitted.

        Raises:
            Exception: what a worker raised ``max_consecutive_failures`` times in a row.
        """
        for actor in list(self._workers):
            weights = self._sink.admit(actor)
            if weights is None:
                continue
            try:
                payload = self._workers[actor].rollout(weights)
            except Exception as error:
                self._sink.abandon(actor)
                self._failures[actor] += 1
                if self._failures[actor] >= self._max_failures:
                    raise
                message = f"the worker of actor {actor} is replaced: {type(error).__name__}: {error}"
                self.replaced.append(("error", message))
                log.warning("%s", message)
                self._replace(actor)
            else:
                self._failures[actor] = 0
                self._sink.deliver(payload)

    def _replace(self, actor: int) -> None:
        failed_at = time.monotonic()
        self.restarts["error"] += 1
        self._restart_indices[actor] += 1
        with contextlib.suppress(Exception):  # what failed may not even be closable
            self._workers[actor].close()
        self._workers[actor] = self._setup.make_worker(actor, self._restart_indices[actor])
        self.recoveries.add(time.monotonic() - failed_at)

    def close(self) -> None:
        """Close all environments."""
        for worker in self._workers.values():
            worker.close()
