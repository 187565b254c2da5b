"""The pool of Ray actors. The only place that knows an actor can die."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.agent import WorkerSetup
from actors.config import ActorConfig
from actors.pool import Feed
from actors.ray_actor import RolloutActor

log = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 600.0
"""A cluster may have to start a machine first; what an unroll may take says nothing about that."""
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0


class TooManyFailures(RuntimeError):
    """One actor failed again and again; the message holds its last error."""


@dataclasses.dataclass(slots=True)
class _Seat:
    """One actor index and whoever holds it now."""

    actor: int
    incarnation: int = -1
    handle: Any = None
    process_id: int | None = None
    """Known once the actor is up; only then is it given work."""
    call: ray.ObjectRef | None = None
    """Its start or its unroll, whichever is under way."""
    deadline: float = 0.0
    failures: int = 0
    """In a row."""
    back_at: float = 0.0


class RayPool:
    """Rollout workers as Ray actors; the dead and the hung are replaced.

    Not thread-safe: ``pump`` and ``close`` are called from one thread, or one after the other.
    """

    def __init__(self, setup: WorkerSetup, num_actors: int, config: ActorConfig, feed: Feed) -> None:
        self._setup, self._config, self._feed = setup, config, feed
        # max_restarts 0: a replacement is made here, where it is counted and gets an incarnation of its own.
        self._remote = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(RolloutActor)
        self._seats = [_Seat(actor) for actor in range(num_actors)]
        self.restarts: Counter[str] = Counter()
        for seat in self._seats:
            self._start(seat)

    @property
    def num_alive(self) -> int:
        """Actors that are up."""
        return len(self.process_ids())

    def process_ids(self) -> list[int]:
        """Process ids of the actors that are up."""
        return [seat.process_id for seat in self._seats if seat.process_id is not None]

    def pump(self, timeout: float) -> None:
        """Replace who is due, start admitted unrolls, deliver finished ones.

        waits for: any unroll under way, at most ``timeout`` seconds     unblocked by: an actor finishing or dying

        Raises:
            TooManyFailures: an actor failed ``max_consecutive_failures`` times in a row.
        """
        now = time.monotonic()
        for seat in self._seats:
            if seat.handle is None and now >= seat.back_at:
                self._start(seat)
            # An actor that is still starting would act with weights that are old when it is up.
            if seat.process_id is not None and seat.call is None:
                weights = self._feed.admit(seat.actor)
                if weights is not None:
                    seat.call = seat.handle.rollout.remote(weights)
                    seat.deadline = now + self._config.unroll_timeout_seconds
        under_way = {seat.call: seat for seat in self._seats if seat.call is not None}
        if not under_way:
            time.sleep(min(timeout, 0.01))
            return
        ready, _ = ray.wait(list(under_way), num_returns=1, timeout=timeout)
        if ready:
            # Whatever else finished meanwhile comes along without a wait of its own.
            ready, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)
        for ref in ready:
            self._collect(under_way[ref], ref)
        for seat in under_way.values():
            if seat.call is not None and time.monotonic() > seat.deadline:
                self._fail(seat, "timeout", TimeoutError("an environment that hangs, or too small a time limit"))

    def _start(self, seat: _Seat) -> None:
        seat.incarnation += 1
        seat.handle = self._remote.remote(self._setup, seat.actor, seat.incarnation)
        seat.call = seat.handle.process_id.remote()
        seat.deadline = time.monotonic() + START_TIMEOUT_SECONDS

    def _collect(self, seat: _Seat, ref: ray.ObjectRef) -> None:
        try:
            answer = ray.get(ref, timeout=self._config.unroll_timeout_seconds)
        except GetTimeoutError as error:
            self._fail(seat, "timeout", error)
        except RayTaskError as error:
            # What the actor raised, without the frames of Ray around it.
            self._fail(seat, "error", error.cause)
        except RayError as error:
            self._fail(seat, "died", error)
        else:
            seat.call = None
            if seat.process_id is None:
                seat.process_id = answer
            else:
                seat.failures = 0
                self._feed.deliver(answer)

    def _fail(self, seat: _Seat, reason: str, error: Exception) -> None:
        self._kill(seat)
        seat.failures += 1
        self.restarts[reason] += 1
        text = f"{type(error).__name__}: {error}"
        if seat.failures >= self._config.max_consecutive_failures:
            raise TooManyFailures(
                f"actor {seat.actor} failed {seat.failures} times in a row ({reason}); the last error: {text}"
            ) from error
        wait = min(FIRST_BACKOFF_SECONDS * 2 ** (seat.failures - 1), LAST_BACKOFF_SECONDS)
        seat.back_at = time.monotonic() + wait
        log.warning(
            "actor %d (incarnation %d) will be replaced in %.1f s (%s): %s",
            seat.actor,
            seat.incarnation,
            wait,
            reason,
            text,
        )

    def _kill(self, seat: _Seat) -> None:
        """End the seat's actor; an unroll under way is abandoned."""
        if seat.handle is not None:
            ray.kill(seat.handle, no_restart=True)
        if seat.process_id is not None and seat.call is not None:
            self._feed.abandon(seat.actor)
        seat.handle = seat.process_id = seat.call = None

    def close(self) -> None:
        """Kill all actors; unrolls under way are abandoned."""
        for seat in self._seats:
            self._kill(seat)
