"""The trajectory queue: admits unrolls, checks and books what comes back, and hands out batches; the same in all modes.

Admission keeps data fresh: an unroll may start only if, with everything that is ahead of it, it will be trained within
``max_policy_lag`` versions. So nothing is thrown away to go faster; a slow learner makes actors wait.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import Reported
from shoal.policy.trajectory import Trajectory, TrajectoryError, TrajectorySpec, from_bytes

log = logging.getLogger(__name__)


class TrajectoryQueue:
    """Between a pool (one thread) and the training loop (another).

    Args:
        spec: the trajectory contract.
        run_id: batches of other runs are strangers.
        num_actors: actors that share the admissions in lock step.
        num_envs: slots per unroll.
        batch_size: segments per update; a multiple of ``num_envs``.
        max_policy_lag: versions that may pass between acting and training.
        ledger: the books, kept here and in the training loop.
    """

    def __init__(
        self,
        spec: TrajectorySpec,
        *,
        run_id: str,
        num_actors: int,
        num_envs: int,
        batch_size: int,
        max_policy_lag: int,
        ledger: Ledger,
    ) -> None:
        self._spec, self._run_id = spec, run_id
        self._num_envs, self._batch_size, self._max_lag = num_envs, batch_size, max_policy_lag
        # In lock step every actor makes the same number of unrolls per version: which data an update sees must not
        # depend on who was faster.
        self._quota = batch_size // (num_actors * num_envs) if max_policy_lag == 0 else None
        self._admitted: Counter[int] = Counter()
        self._begun: dict[int, int] = {}
        """By actor: the version that its unroll under way is made with."""
        self._queue: deque[Trajectory] = deque()
        self._under_way = 0
        self._updating = False
        self._version, self._weights = -1, None
        self._next_sequence: dict[tuple[int, int], int] = {}
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self.ledger = ledger
        self.refused: Counter[str] = Counter()
        """Deliveries without env steps in the books: not a trajectory, or one that was booked already."""
        self.lost_unrolls = 0
        """Admitted and never delivered because their actor ended before the run did; their steps were never seen."""
        self.queued_bytes = 0
        self.sampled_episodes = 0
        """That ended in what was delivered."""

    # The pool's side (actors.pool.Feed).

    def admit(self, actor: int) -> Any | None:
        """The newest weights if this actor may start an unroll now, else None."""
        with self._changed:
            if self._version < 0:
                return None
            if self._under_way == 0:
                # Whose unroll a refused delivery was, nobody knows. Once all have come back, the admissions that count
                # are those that gave a trajectory; else lock step would wait for ever for the one that was refused.
                self._admitted = Counter(trajectory.header.actor for trajectory in self._queue)
                self._begun.clear()
            ahead = len(self._queue) + self._under_way
            lag = self._updating + ((ahead + 1) * self._num_envs - 1) // self._batch_size
            if lag > self._max_lag or (self._quota is not None and self._admitted[actor] >= self._quota):
                return None
            self._admitted[actor] += 1
            self._begun[actor] = self._version
            self._under_way += 1
            return self._weights

    def deliver(self, payload: np.ndarray) -> None:
        """Check and book one unroll. What is no trajectory of this run, or came before, is counted and left."""
        with self._changed:
            self._under_way -= 1
        try:
            trajectory = from_bytes(self._spec, payload, run_id=self._run_id, max_slots=self._num_envs)
            if trajectory.num_slots != self._num_envs:
                raise TrajectoryError(f"expected {self._num_envs} slots, got {trajectory.num_slots}")
        except TrajectoryError as error:
            log.warning("a delivery was refused: %s", error)
            self.refused["malformed"] += 1
            return
        header = trajectory.header
        with self._changed:
            self._begun.pop(header.actor, None)
            expected = self._next_sequence.get((header.actor, header.restart_index), 0)
            if header.sequence < expected:
                self.refused["duplicate"] += 1
                return
            self._next_sequence[header.actor, header.restart_index] = header.sequence + 1
            steps = trajectory.env_steps
            self.sampled_episodes += len(header.statistics.get("episode_returns", ()))
            self.ledger.sampled += steps
            self.ledger.in_flight += steps
            self.queued_bytes += trajectory.num_bytes
            self._queue.append(trajectory)
            self._changed.notify_all()

    def abandon(self, actor: int) -> None:
        """An admitted unroll of this actor will never be delivered; its successor may take its place."""
        with self._changed:
            self._under_way -= 1
            self._admitted[actor] -= 1
            self._begun.pop(actor, None)
            self.lost_unrolls += 1

    def count_lost(self, unrolls: int) -> None:
        """Unrolls that a learner beside this one had begun when it ended."""
        with self._changed:
            self.lost_unrolls += unrolls

    def count_episodes(self, trajectories: Iterable[Reported]) -> None:
        """What a learner beside this one took in."""
        with self._changed:
            self.sampled_episodes += sum(len(t.statistics["episode_returns"]) for t in trajectories)

    def fail(self, error: BaseException) -> None:
        """The pool ended: whoever waits for a batch gets the error."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    # The training loop's side.

    def publish(self, policy_version: int, weights: Any) -> None:
        """From now on unrolls start with these weights; ends the update begun by ``next_batch``."""
        with self._changed:
            self._version, self._weights = policy_version, weights
            self._updating = False
            self._admitted.clear()
            self._changed.notify_all()

    def next_batch(self, drive: Callable[[float], None] | None, stop: threading.Event) -> list[Trajectory] | None:
        """The trajectories of one update, oldest first (in lock step by actor); None where ``stop`` was set.

        waits for: batch_size segments     unblocked by: deliver, fail, stop

        ``drive`` makes the data where no other thread does. The trajectories stay in flight until ``book``.

        Raises:
            RuntimeError: the pool ended; its error is the cause.
        """
        count = self._batch_size // self._num_envs
        while not stop.is_set():
            with self._changed:
                if self._failure is not None:
                    raise RuntimeError(f"the rollout pool ended: {self._failure}") from self._failure
                self._drop_stale()
                if len(self._queue) >= count:
                    batch = [self._queue.popleft() for _ in range(count)]
                    self.queued_bytes -= sum(trajectory.num_bytes for trajectory in batch)
                    self._updating = True
                    if self._quota is not None:
                        batch.sort(key=lambda trajectory: (trajectory.header.actor, trajectory.header.sequence))
                    return batch
                if drive is None:
                    self._changed.wait(timeout=0.1)
            if drive is not None:
                drive(0.1)
        return None

    def book(self, batch: list[Trajectory], *, trained: int, dropped: str | None = None) -> Ledger:
        """Enter a finished update into the books: ``trained`` steps as its loss counted them, or all as dropped.

        Returns what becomes of these trajectories, as books of their own.
        """
        with self._changed:
            steps = sum(trajectory.env_steps for trajectory in batch)
            lost = Counter({dropped: steps} if dropped is not None else {})
            self.ledger.add(Ledger(trained=trained, in_flight=-steps, dropped=lost))
            return Ledger(sampled=steps, trained=trained, dropped=lost)

    def add_books(self, books: Ledger) -> None:
        """Enter what a learner beside this one booked."""
        with self._changed:
            self.ledger.add(books)

    def books(self) -> Ledger:
        """A copy of the books between two bookings."""
        with self._changed:
            return dataclasses.replace(self.ledger, dropped=Counter(self.ledger.dropped))

    def close(self) -> None:
        """Drop what no update will use any more, as ``shutdown``."""
        with self._changed:
            self._drop(list(self._queue), "shutdown")
            self._queue.clear()

    def imbalance(self) -> int:
        """``ledger.balance()`` between two bookings, not in the middle of one: for readers in other threads."""
        with self._changed:
            return self.ledger.balance()

    @property
    def max_policy_lag(self) -> int:
        """Versions that may pass between acting and training."""
        return self._max_lag

    def lags(self) -> list[int]:
        """Of every unroll under way: versions made since it began."""
        with self._changed:
            return [self._version - begun for begun in self._begun.values()]

    @property
    def queued_segments(self) -> int:
        """Segments that wait for their update."""
        return len(self._queue) * self._num_envs

    def _drop_stale(self) -> None:
        stale = [t for t in self._queue if self._version - t.header.policy_version > self._max_lag]
        if stale:
            self._drop(stale, "stale")
            self._queue = deque(t for t in self._queue if self._version - t.header.policy_version <= self._max_lag)

    def _drop(self, trajectories: list[Trajectory], reason: str) -> None:
        if not trajectories:
            return
        steps = sum(trajectory.env_steps for trajectory in trajectories)
        self.ledger.in_flight -= steps
        self.ledger.dropped[reason] += steps
        self.queued_bytes -= sum(trajectory.num_bytes for trajectory in trajectories)


class Driver(threading.Thread):
    """Pumps a pool from a thread of its own, so that actors get new work while the learner updates.

    consumes: nothing     waits for: the pool's unrolls     produces: deliveries into the trajectory queue
    Ends with ``stop``; an error of the pool ends it too and reaches whoever waits for a batch.
    """

    def __init__(self, pump: Callable[[float], None], trajectory_queue: TrajectoryQueue) -> None:
        super().__init__(name="rollout-driver", daemon=True)
        self._pump, self._trajectory_queue, self._stopped = pump, trajectory_queue, threading.Event()

    def run(self) -> None:
        """Pump until stopped."""
        try:
            while not self._stopped.is_set():
                self._pump(0.02)
        except BaseException as error:  # noqa: BLE001  (handed to the training loop, which raises it)
            self._trajectory_queue.fail(error)

    def stop(self) -> None:
        """Stop after the current pump; the pool may be closed then."""
        self._stopped.set()
        self.join()
