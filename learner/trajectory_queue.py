"""The trajectory queue: between a pool, which delivers unrolls, and the training loop, which takes batches of them.

The same in all launch modes. It puts four parts under one lock: admission decides which actor may start an unroll, the
weights store has the weights that it starts with, the mailbox keeps the unrolls that came back, and the ledger counts
every environment step.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any, Literal

import numpy as np
from shoal.learner.admission import Admission, Unroll
from shoal.learner.ledger import DropReason, Ledger
from shoal.learner.mailbox import Mailbox, Place
from shoal.learner.statistics import TrajectoryReport
from shoal.learner.weights_store import WeightsStore
from shoal.policy.trajectory import Trajectory, TrajectoryError, TrajectorySpec, from_bytes, to_bytes

log = logging.getLogger(__name__)

Refusal = Literal["malformed", "duplicate"]
"""Why a delivery is refused."""


def log_refused(why: str) -> None:
    """Warn of a delivery that was refused."""
    log.warning("a delivery was refused: %s", why)


class TrajectoryQueue:
    """``actors.pool.TrajectorySink`` for a pool (one thread), batches for the training loop (another).

    Every public method takes the lock; deliveries are parsed and checked outside it.

    Args:
        spec: the trajectory contract.
        run_id: trajectories of other runs are refused.
        num_actors: actors that share the admissions in lock step.
        num_envs: slots per unroll.
        batch_size: segments per update; a multiple of ``num_envs``.
        max_policy_lag: versions that may pass between acting and training.
        ledger: the step accounting, kept here.
        clock: seconds from any origin; it stands still where one thread acts and learns in turn (``Admission``).
        drops_stale: drop what came too late for ``max_policy_lag``. Not where one of several policies is trained
            (``learner.policy_queues``): all of them train the unrolls of the same games.
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
        clock: Callable[[], float] = time.monotonic,
        drops_stale: bool = True,
    ) -> None:
        self._spec, self._run_id = spec, run_id
        self._num_envs, self._batch_size, self._drops_stale = num_envs, batch_size, drops_stale
        self._admission = Admission(
            num_actors=num_actors,
            num_envs=num_envs,
            batch_size=batch_size,
            max_policy_lag=max_policy_lag,
            clock=clock,
        )
        self._mailbox = Mailbox()
        self._weights = WeightsStore()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self.ledger = ledger
        self.refused: Counter[Refusal] = Counter()
        """Refused deliveries by reason; the ledger does not count them."""
        self.lost_unrolls = 0
        """Unrolls that were admitted and never delivered, because their actor ended; their steps were never sampled."""
        self.sampled_episodes = 0
        """Episodes that ended in delivered trajectories."""

    # The pool's side (actors.pool.TrajectorySink).

    def admit(self, idle: Sequence[int]) -> tuple[int, Any] | None:
        """One of the ``idle`` actors that may start an unroll now, and the newest weights; None where none may.

        Who has waited longest is next (``Admission``).
        """
        with self._changed:
            version = self._weights.policy_version
            if version < 0 or (actor := self._admission.admit(idle, version, len(self._mailbox))) is None:
                return None
            return actor, self._weights.newest

    def follow(self, actor: int) -> Any:
        """The newest weights for an unroll of ``actor`` that another queue admitted; it is under way here, too."""
        with self._changed:
            self._admission.begin(actor, self._weights.policy_version)
            return self._weights.newest

    def deliver(self, actor: int, payload: np.ndarray) -> str | None:
        """Check and count one unroll (uint8) of ``actor``; None where it is taken.

        One that is malformed, of another run or a duplicate is refused: the answer says why.
        """
        unroll = self._came_back(actor)
        if isinstance(unroll, str):
            log_refused(unroll)
            return unroll
        try:
            trajectory = self.read(payload)
        except TrajectoryError as error:
            log_refused(str(error))
            self._count_malformed(actor)
            return str(error)
        return self._put(actor, unroll, trajectory)

    def read(self, payload: np.ndarray) -> Trajectory:
        """Check an unroll (uint8) that came back, and count nothing.

        Raises:
            TrajectoryError: it is malformed or of another run.
        """
        trajectory = from_bytes(self._spec, payload, run_id=self._run_id, max_slots=self._num_envs)
        if trajectory.num_slots != self._num_envs:
            raise TrajectoryError(f"expected {self._num_envs} slots, got {trajectory.num_slots}")
        return trajectory

    def take(self, actor: int, trajectory: Trajectory) -> str | None:
        """``deliver`` for what ``read`` has checked; a refusal is for the caller to log."""
        unroll = self._came_back(actor)
        return unroll if isinstance(unroll, str) else self._put(actor, unroll, trajectory)

    def refuse(self, actor: int) -> None:
        """Count what ``actor`` delivered as malformed, here or at a queue that its unroll is shared with."""
        if not isinstance(self._came_back(actor), str):
            self._count_malformed(actor)

    def _came_back(self, actor: int) -> Unroll | str:
        """The unroll of ``actor`` that is under way no more; why it is refused, where none was."""
        with self._changed:
            unroll = self._admission.came_back(actor)
        if unroll is None:
            self.refused["malformed"] += 1
            return f"actor {actor} delivered an unroll that it was never admitted to"
        return unroll

    def _put(self, actor: int, unroll: Unroll, trajectory: Trajectory) -> str | None:
        header = trajectory.header
        with self._changed:
            if self._mailbox.is_duplicate(header):
                self._admission.refused(actor)
                self.refused["duplicate"] += 1
                return f"actor {actor} delivered unroll {header.sequence} again, or after a later one"
            steps = trajectory.env_steps
            self.sampled_episodes += len(header.statistics.get("episode_returns", ()))
            self.ledger.sampled += steps
            self.ledger.in_flight += steps
            self._mailbox.put(self._admission.place(actor, unroll, self._weights.policy_version), trajectory)
            self._changed.notify_all()
        return None

    def _count_malformed(self, actor: int) -> None:
        with self._changed:
            self._admission.refused(actor)
            self.refused["malformed"] += 1

    def abandon(self, actor: int) -> None:
        """The admitted unroll of ``actor`` will never be delivered; its successor may make one instead."""
        with self._changed:
            self._admission.abandoned(actor)
            self.lost_unrolls += 1

    def fail(self, error: BaseException) -> None:
        """The pool ended with ``error``: ``next_batch`` raises it."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    # The training loop's side.

    def publish(self, policy_version: int, weights: Any) -> None:
        """Start unrolls with these weights from now on, and end the update that ``next_batch`` began."""
        with self._changed:
            self._weights.publish(policy_version, weights)
            self._admission.published(policy_version)
            self._changed.notify_all()

    def next_batch(self, drive: Callable[[float], None] | None, stop: threading.Event) -> list[Trajectory] | None:
        """Take the trajectories of one update, oldest first (in lock step by actor); None where ``stop`` was set.

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
                if self._drops_stale:
                    self._drop(self._mailbox.take_stale(self._weights.policy_version), "stale")
                if len(self._mailbox) >= count:
                    batch = self._mailbox.take(count)
                    self._admission.update_began()
                    if self._admission.lock_step:
                        batch.sort(key=lambda trajectory: (trajectory.header.actor, trajectory.header.sequence))
                    return batch
                if drive is None:
                    self._changed.wait(timeout=0.1)
            if drive is not None:
                drive(0.1)
        return None

    def has_batch(self) -> bool:
        """Whether the trajectories of the next update are there."""
        with self._changed:
            return len(self._mailbox) >= self._batch_size // self._num_envs

    def book(self, batch: list[Trajectory], *, trained: int, dropped: DropReason | None = None) -> Ledger:
        """Count a finished update: ``trained`` steps as its loss counted them, or all steps as ``dropped``, a reason.

        Returns the ledger of these trajectories alone.
        """
        with self._changed:
            steps = sum(trajectory.env_steps for trajectory in batch)
            lost = Counter({dropped: steps} if dropped is not None else {})
            self.ledger.add(Ledger(trained=trained, in_flight=-steps, dropped=lost))
            return Ledger(sampled=steps, trained=trained, dropped=lost)

    def close(self) -> None:
        """Drop the trajectories that still wait, as ``shutdown``."""
        with self._changed:
            self._drop(self._mailbox.take(len(self._mailbox)), "shutdown")

    def get_state(self) -> dict[str, Any]:
        """What waits and what later admissions depend on, as plain data; with no unroll or update under way."""
        with self._changed:
            waiting = [
                {
                    "order": list(place.order),
                    "latest_version": place.latest_version,
                    "payload": to_bytes(self._spec, trajectory.header, trajectory.columns),
                }
                for place, trajectory in self._mailbox.waiting()
            ]
            return {"waiting": waiting, "admission": self._admission.get_state()}

    def set_state(self, state: Any, in_flight: int) -> None:
        """Go on from ``get_state``, before the first call; ``in_flight`` steps wait by the ledger.

        Raises:
            ValueError: it is no such state of this queue, which is as it was.
        """
        try:
            waiting = [self._waited(each) for each in state["waiting"]]
            steps = sum(trajectory.env_steps for _, trajectory in waiting)
            if steps != in_flight:
                raise ValueError(f"{steps} environment steps wait, and the ledger has {in_flight} in flight")
            with self._changed:
                self._admission.set_state(state["admission"])
                for place, trajectory in waiting:
                    self._mailbox.put_back(place, trajectory)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"damaged ({type(error).__name__}: {error})") from error

    def _waited(self, saved: Any) -> tuple[Place, Trajectory]:
        trajectory = from_bytes(self._spec, saved["payload"], max_slots=self._num_envs)
        version, serial = saved["order"]
        latest = saved["latest_version"]
        if trajectory.num_slots != self._num_envs or not {type(version), type(serial), type(latest)} <= {int, NoneType}:
            raise ValueError("an unroll that waited is damaged")
        return Place((version, serial), latest), trajectory

    # Reports of peer learners.

    def add(self, steps: Ledger) -> None:
        """Add the steps that a peer learner counted."""
        with self._changed:
            self.ledger.add(steps)

    def add_lost_unrolls(self, unrolls: int) -> None:
        """Add unrolls that a peer learner began and lost."""
        with self._changed:
            self.lost_unrolls += unrolls

    def add_episodes(self, reports: Iterable[TrajectoryReport]) -> None:
        """Add the episodes that ended in a peer learner's trajectories."""
        with self._changed:
            self.sampled_episodes += sum(len(report.statistics["episode_returns"]) for report in reports)

    # For readers in any thread.

    def snapshot(self) -> Ledger:
        """A copy of the ledger, made between two changes."""
        with self._changed:
            return dataclasses.replace(self.ledger, dropped=Counter(self.ledger.dropped))

    def imbalance(self) -> int:
        """``ledger.balance()``, read between two changes."""
        with self._changed:
            return self.ledger.balance()

    def lags(self) -> list[int]:
        """Policy lag of every unroll under way: the versions made since it began."""
        with self._changed:
            return self._admission.lags(self._weights.policy_version)

    def late(self) -> int:
        """Number of unrolls under way that will be too old to be trained when they come back.

        0 where none is dropped.
        """
        if not self._drops_stale:
            return 0
        with self._changed:
            return self._admission.late(self._weights.policy_version)

    @property
    def max_policy_lag(self) -> int:
        """Versions that may pass between acting and training."""
        return self._admission.max_policy_lag

    @property
    def queued_segments(self) -> int:
        """Segments that wait for their update."""
        return len(self._mailbox) * self._num_envs

    @property
    def queued_bytes(self) -> int:
        """Bytes of the trajectories that wait for their update."""
        return self._mailbox.num_bytes

    def _drop(self, trajectories: list[Trajectory], reason: DropReason) -> None:
        if trajectories:
            steps = sum(trajectory.env_steps for trajectory in trajectories)
            self.ledger.in_flight -= steps
            self.ledger.dropped[reason] += steps
