"""Who runs the rollout workers: what a pool needs of the learner's side, and the pool that runs them in this process.

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
MOST_TOLD = 100
"""Replacements that are kept for whoever tells them."""

State = Literal["up", "starting", "unplaced", "pausing"]
"""Of an actor: it can make unrolls; its process makes policy and environments; it waits for a place, or for its process
to say where it is; it failed, and another comes after a pause."""


@dataclasses.dataclass(slots=True)
class Recoveries:
    """How long replacements took: from the moment a failure was noticed to the successor being up."""

    count: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    """Seconds."""

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.seconds += seconds
        self.slowest = max(self.slowest, seconds)


class TrajectorySink(Protocol):
    """What a pool needs of the learner's side."""

    def admit(self, actor: int) -> Any | None:
        """The newest weights if this actor may start an unroll now, else None. What is admitted is under way."""

    def deliver(self, payload: np.ndarray) -> None:
        """Hand over a finished unroll's bytes."""

    def abandon(self, actor: int) -> None:
        """An admitted unroll of this actor will never be delivered."""


class InlinePool:
    """Rollout workers in this process, one after the other: deterministic, and steps into a debugger.

    Args:
        actors: their indices in the run.
        restart index: how often the process that they live in was replaced before.
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
        self.replaced: deque[tuple[str, str]] = deque(maxlen=MOST_TOLD)
        """The last workers replaced: the reason in a word, and in a sentence; whoever tells them may empty it."""
        self.restarts: Counter[str] = Counter()
        self.recoveries = Recoveries()

    @property
    def num_alive(self) -> int:
        """Workers that can make unrolls."""
        return len(self._workers)

    @property
    def states(self) -> Counter[State]:
        """Workers by what they are at."""
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
                told = f"the worker of actor {actor} is replaced: {type(error).__name__}: {error}"
                self.replaced.append(("error", told))
                log.warning("%s", told)
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
