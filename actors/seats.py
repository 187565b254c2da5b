"""Seats: numbered places that Ray actors hold, and what happens when one of them fails."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.ray_actor import Whereabouts

log = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 600.0
"""A cluster may have to start a machine first; what a call may take says nothing about that."""
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0


class TooManyFailures(RuntimeError):
    """One actor failed again and again; the message holds its last error."""


@dataclasses.dataclass(slots=True, eq=False)
class Seat:
    """One actor index and whoever holds it now."""

    actor: int
    incarnation: int = -1
    handle: Any = None
    whereabouts: Whereabouts | None = None
    """Known once the actor is up; only then is it given work."""
    call: ray.ObjectRef | None = None
    """Its start or its work, whichever is under way."""
    work: str = ""
    """The method last called."""
    deadline: float = 0.0
    failures: int = 0
    """In a row."""
    back_at: float = 0.0


class Seats:
    """Starts, calls, collects, kills and replaces; whoever uses it decides what the actors do.

    Args:
        title: what the actors are called in messages.
        make: starts the actor of (index, incarnation); it has a method ``whereabouts``.
        call_timeout_seconds: a call that takes longer counts as hung.
        max_consecutive_failures: of one seat, after which the run ends.
        on_lost: told of a seat whose work under way will never be answered.
    """

    def __init__(
        self,
        indices: range,
        *,
        title: str,
        make: Callable[[int, int], Any],
        call_timeout_seconds: float,
        max_consecutive_failures: int,
        on_lost: Callable[[Seat], None],
    ) -> None:
        self._title, self._make, self._on_lost = title, make, on_lost
        self._call_timeout, self._max_failures = call_timeout_seconds, max_consecutive_failures
        self.all = [Seat(index) for index in indices]
        self.restarts: Counter[str] = Counter()
        for seat in self.all:
            self.start(seat)

    def up(self) -> list[Seat]:
        """Seats whose actors are up."""
        return [seat for seat in self.all if seat.whereabouts is not None]

    def process_ids(self) -> list[int]:
        """Process ids of the actors that are up."""
        return [seat.whereabouts.process_id for seat in self.all if seat.whereabouts is not None]

    def start(self, seat: Seat) -> None:
        """Put a new actor into the seat."""
        seat.incarnation += 1
        seat.handle = self._make(seat.actor, seat.incarnation)
        seat.call = seat.handle.whereabouts.remote()
        seat.deadline = time.monotonic() + START_TIMEOUT_SECONDS

    def start_due(self) -> None:
        """Start whoever's time to come back is there."""
        now = time.monotonic()
        for seat in self.all:
            if seat.handle is None and now >= seat.back_at:
                self.start(seat)

    def call(self, seat: Seat, method: str, *arguments: Any) -> None:
        """Begin a piece of work; ``collect`` gives the answer."""
        seat.work = method
        seat.call = getattr(seat.handle, method).remote(*arguments)
        seat.deadline = time.monotonic() + self._call_timeout

    def collect(self, seat: Seat) -> Any | None:
        """The answer of a finished call; None where the actor just started, or failed and will be replaced.

        Raises:
            TooManyFailures: this was one failure too many.
        """
        try:
            answer = ray.get(seat.call, timeout=self._call_timeout)
        except GetTimeoutError as error:
            self.fail(seat, "timeout", error)
        except RayTaskError as error:
            # What the actor raised, without the frames of Ray around it.
            self.fail(seat, "error", error.cause)
        except RayError as error:
            self.fail(seat, "died", error)
        else:
            seat.call = None
            if seat.whereabouts is not None:
                seat.failures = 0
                return answer
            seat.whereabouts = answer
        return None

    def answer(self, seat: Seat) -> Any | None:
        """Wait for this seat's answer, at most until its deadline; None as ``collect``."""
        ready, _ = ray.wait([seat.call], timeout=max(0.0, seat.deadline - time.monotonic()))
        if ready:
            return self.collect(seat)
        # Of this one alone: another may have answered long ago, and just not been asked yet.
        self._fail_late(seat)
        return None

    def fail_overdue(self) -> None:
        """Fail whoever has not answered in time."""
        now = time.monotonic()
        for seat in self.all:
            if seat.call is not None and now > seat.deadline:
                self._fail_late(seat)

    def _fail_late(self, seat: Seat) -> None:
        self.fail(seat, "timeout", TimeoutError("an environment that hangs, or too small a time limit"))

    def fail(self, seat: Seat, reason: str, error: Exception) -> None:
        """End the seat's actor; another will come after a pause that grows with every failure."""
        # Ray asks a process to end; one that hangs may not hear it, and would keep its core.
        self.kill(seat, at_once=reason == "timeout")
        seat.failures += 1
        self.restarts[reason] += 1
        text = f"{type(error).__name__}: {error}"
        if seat.failures >= self._max_failures:
            raise TooManyFailures(
                f"{self._title} {seat.actor} failed {seat.failures} times in a row ({reason}); the last error: {text}"
            ) from error
        wait = min(FIRST_BACKOFF_SECONDS * 2 ** (seat.failures - 1), LAST_BACKOFF_SECONDS)
        seat.back_at = time.monotonic() + wait
        log.warning(
            "%s %d (incarnation %d) will be replaced in %.1f s (%s): %s",
            self._title,
            seat.actor,
            seat.incarnation,
            wait,
            reason,
            text,
        )

    def kill(self, seat: Seat, *, at_once: bool = False) -> None:
        """End the seat's actor; work under way is lost. ``at_once``: by a signal, where it runs on this machine."""
        if seat.handle is not None:
            ray.kill(seat.handle, no_restart=True)
            here = ray.get_runtime_context().get_node_id()
            if at_once and seat.whereabouts is not None and seat.whereabouts.node_id == here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seat.whereabouts.process_id, signal.SIGKILL)
        if seat.whereabouts is not None and seat.call is not None:
            self._on_lost(seat)
        seat.handle = seat.whereabouts = seat.call = None

    def close(self) -> None:
        """Kill all actors; work under way is lost."""
        for seat in self.all:
            self.kill(seat)
