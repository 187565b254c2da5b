"""The rollout driver: a thread that gives actors new work while the learner updates."""

from __future__ import annotations

import threading
from collections.abc import Callable

from shoal.learner.policy_queues import PolicyQueues
from shoal.learner.trajectory_queue import TrajectoryQueue


class RolloutDriver(threading.Thread):
    """Pumps a pool from a thread of its own.

    consumes: nothing     waits for: the pool's unrolls     produces: deliveries into the queue
    Ends with ``stop``; an error of the pool ends it, too, and is raised by ``TrajectoryQueue.next_batch``.
    """

    def __init__(self, pump: Callable[[float], None], queue: TrajectoryQueue | PolicyQueues) -> None:
        super().__init__(name="rollout-driver", daemon=True)
        self._pump, self._queue, self._stopped = pump, queue, threading.Event()

    def run(self) -> None:
        """Pump until stopped."""
        try:
            while not self._stopped.is_set():
                self._pump(0.02)
        except BaseException as error:  # noqa: BLE001  (handed to the training loop, which raises it)
            self._queue.fail(error)

    def stop(self, wait: Callable[[Callable[[], None]], object] = lambda join: join()) -> None:
        """Stop after the current pump; then the pool may be closed. ``wait`` calls what waits for it."""
        self._stopped.set()
        if self.ident is not None:  # None where the run failed before it started its driver
            wait(self.join)
