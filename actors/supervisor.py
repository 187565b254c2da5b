"""Supervision of Ray actors: numbered slots, each holding one actor that is replaced when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from shoal.actors.pool import MOST_REPORTED, Recoveries, ReplacementReason, backoff_seconds
from shoal.actors.ray_actor import ProcessLocation
from shoal.actors.ray_nodes import NoAnswer, draining_nodes, end_process, living_nodes, starting_processes
from shoal.actors.ray_words import in_short
from shoal.envs.config import EnvironmentNotFound

log = logging.getLogger(__name__)

BUILD_TIMEOUT_SECONDS = 600.0
"""Time limit for the start of a process, and again for making policy and environments; independent of the limit of a
call."""
LOOK_SECONDS = 1.0
"""Interval at which draining nodes and waiting actors are looked up."""
FETCH_SECONDS = 1.0
"""How long an answer that is here may take to be read. One that was lost again is fetched from its node, which may
hang: the others do not wait for that."""
REPORT_AFTER_SECONDS, REPORT_AGAIN_SECONDS = 15.0, 60.0
"""How long an actor waits for a place before a warning is logged, and the interval between such warnings."""
VERDICT_SECONDS = 75.0
"""How long Ray may take to notice that a node has ended: it looks five times, 3 s apart and for 10 s (Ray 2.60)."""
BLAMELESS: frozenset[ReplacementReason] = frozenset({"preempted", "node_died"})
"""Reasons that say nothing about the actor: they do not count as failures of it."""
MISSING = (ModuleNotFoundError, EnvironmentNotFound)
"""Errors of a start that the next one would have, too."""


class TooManyFailures(RuntimeError):
    """One actor failed again and again, or lacks a module; the message holds its last error."""


@dataclasses.dataclass(slots=True, eq=False)
class ActorSlot:
    """One actor index and the actor that holds it now."""

    actor: int
    restart_index: int = -1
    handle: Any = None
    process_location: ProcessLocation | None = None
    """Known once the actor has a place."""
    built: bool = False
    """Policy and environments are made: the actor takes work."""
    call: ray.ObjectRef | None = None
    """Its start or its work, whichever is under way."""
    work: str = ""
    """The method last called: ``process_location`` and ``build`` are its start."""
    since: float = 0.0
    """Monotonic time of its start."""
    deadline: float = 0.0
    failures: int = 0
    """Consecutive failures."""
    answers: int = 0
    """Finished calls of all its actors."""
    back_at: float = 0.0
    failed_at: float | None = None
    """Monotonic time of the predecessor's failure, until this actor is up."""
    unplaced_seconds: float = 0.0
    """Since then, how long there was no place for an actor."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LostActor:
    """An actor that is out of reach, and replaced, while Ray does not know yet whether its node has ended."""

    slot: ActorSlot
    answers: int
    """Of its slot, when it was lost."""
    node_id: str
    name: str
    error: Exception
    since: float
    """Monotonic time."""


class Supervisor:
    """Starts, calls, kills and replaces the actors of all slots; its user decides which methods they run.

    Args:
        title: name of the actors in messages.
        make: starts the actor of (index, restart index); it has methods ``process_location`` and ``build``.
        needs: what an actor needs to find a place, in words.
        call_timeout_seconds: a call that takes longer counts as hung.
        max_consecutive_failures: of one actor slot, after which the run ends.
        on_lost: called with an actor slot whose work in flight will never be answered.
    """

    def __init__(
        self,
        indices: range,
        *,
        title: str,
        make: Callable[[int, int], Any],
        needs: str,
        call_timeout_seconds: float,
        max_consecutive_failures: int,
        on_lost: Callable[[ActorSlot], None],
        build_timeout_seconds: float = BUILD_TIMEOUT_SECONDS,
    ) -> None:
        self._title, self._make, self._needs, self._on_lost = title, make, needs, on_lost
        self._call_timeout, self._max_failures = call_timeout_seconds, max_consecutive_failures
        self._build_timeout = build_timeout_seconds
        self.all = [ActorSlot(index) for index in indices]
        self.restarts: Counter[str] = Counter()
        self.recoveries = Recoveries()
        self.replaced: deque[tuple[str, str]] = deque(maxlen=MOST_REPORTED)
        """The latest replacements as (reason label, message); whoever reports them may empty it."""
        self._one_was_up = False
        self._lost: list[LostActor] = []
        self._draining: frozenset[str] = frozenset()
        self._look_at = 0.0
        self._reported_at = -math.inf
        for slot in self.all:
            self.start(slot)

    def up(self) -> list[ActorSlot]:
        """Actor slots whose actors are up."""
        return [slot for slot in self.all if slot.built]

    def process_ids(self) -> list[int]:
        """Process ids of the actors that have a place."""
        return [slot.process_location.process_id for slot in self.all if slot.process_location is not None]

    def start(self, slot: ActorSlot) -> None:
        """Put a new actor into the actor slot."""
        slot.restart_index += 1
        slot.handle = self._make(slot.actor, slot.restart_index)
        slot.work = "process_location"
        slot.call = slot.handle.process_location.remote()
        slot.since = time.monotonic()
        # A cluster may have to start a machine first, or has none to spare for now: that is waiting, not hanging.
        # Once there is a process (``_look_for_waiting``), it has as long as for building.
        slot.deadline = math.inf

    def start_due(self) -> None:
        """Start actors whose pause is over; move idle actors off draining nodes; say why lost ones were lost.

        Raises:
            TooManyFailures: that was one failure too many.
        """
        now = time.monotonic()
        for slot in self.all:
            if slot.handle is None and now >= slot.back_at:
                self.start(slot)
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            # Of a head that does not answer nothing new is known; ``ray_watch`` judges whether it is lost.
            with contextlib.suppress(NoAnswer):
                self._draining = draining_nodes()
                self._look_for_waiting(now)
                self._judge_lost(now - VERDICT_SECONDS)
        for slot in self.up() if self._draining else ():
            # A call in flight is finished and collected first.
            if slot.call is None and self.must_leave(slot):
                self._move(slot)

    def must_leave(self, slot: ActorSlot) -> bool:
        """True if the actor slot's node is draining: the actor gets no new work there."""
        return slot.process_location is not None and slot.process_location.node_id in self._draining

    def _move(self, slot: ActorSlot) -> None:
        message = f"{self._title} {slot.actor} leaves its node, which is draining; it starts on another one"
        self._report("preempted", message)
        self._begin_recovery(slot)
        self.kill(slot)
        self.start(slot)

    def _look_for_waiting(self, now: float) -> None:
        waiting = [
            s for s in self.all if s.handle and s.work == "process_location" and now - s.since > REPORT_AFTER_SECONDS
        ]
        if not waiting or now - self._reported_at <= REPORT_AGAIN_SECONDS:
            return
        self._reported_at = now
        processes = starting_processes()
        for slot in waiting:
            if slot.process_location is None and (place := processes.get(slot.handle._actor_id.hex())):
                slot.process_location = place
                slot.deadline = now + self._build_timeout
        no_place = sum(slot.process_location is None for slot in waiting)
        starting = len(waiting) - no_place
        parts = [f"{no_place} wait for a place (each needs {self._needs})"] if no_place else []
        parts += [f"the processes of {starting} are still starting"] if starting else []
        log.warning(
            "%d of %d %ss are not up yet: %s; the others work meanwhile",
            len(waiting),
            len(self.all),
            self._title,
            ", ".join(parts),
        )

    def call(self, slot: ActorSlot, method: str, *arguments: Any) -> None:
        """Call a method of the actor; ``collect`` gives the answer."""
        slot.work = method
        slot.call = getattr(slot.handle, method).remote(*arguments)
        slot.deadline = time.monotonic() + self._call_timeout

    def collect(self, slot: ActorSlot) -> Any | None:
        """The answer of a finished call; None where the actor just started, or failed and will be replaced.

        Also None where the answer cannot be read in ``FETCH_SECONDS``: the call stays under way, until its deadline.

        Raises:
            TooManyFailures: this was one failure too many.
        """
        try:
            answer = ray.get(slot.call, timeout=FETCH_SECONDS)
        except GetTimeoutError:
            log.info("the answer of %s was here and is no longer; it is fetched again", self._name(slot))
        except RayTaskError as error:
            # What the actor raised, without the frames of Ray around it.
            full = isinstance(error.cause, ObjectStoreFullError | OutOfDiskError)
            self.fail(slot, "object_store" if full else "error", error.cause)
        except RayError as error:
            reason, place = _reason(error), slot.process_location
            if reason == "died" and isinstance(error, ActorUnavailableError) and place is not None:
                self._lose(slot, place.node_id, error)
            else:
                self.fail(slot, reason, error)
        else:
            slot.call = None
            if slot.built:
                slot.failures = 0
                slot.answers += 1
                return answer
            if slot.work == "process_location":
                slot.process_location = answer
                slot.unplaced_seconds += _unplaced_seconds(time.monotonic() - slot.since, answer)
                slot.work = "build"
                slot.call = slot.handle.build.remote()
                slot.deadline = time.monotonic() + self._build_timeout
            else:
                slot.built = self._one_was_up = True
                if slot.failed_at is not None:
                    self.recoveries.add(time.monotonic() - slot.failed_at - slot.unplaced_seconds)
                    slot.failed_at = None
                log.info("%s is up: %s", self._name(slot), slot.process_location)
        return None

    def answer(self, slot: ActorSlot) -> Any | None:
        """Wait for this actor slot's answer, at most until its deadline; None as ``collect``."""
        left = math.inf
        while left > 0:
            left = max(0.0, slot.deadline - time.monotonic())
            if not ray.wait([slot.call], timeout=left)[0]:
                break
            answer = self.collect(slot)
            if slot.call is None:
                return answer
        # Only this slot: another may have answered long ago and not been collected yet.
        self._fail_late(slot)
        return None

    def fail_overdue(self) -> None:
        """Fail actors whose call is past its deadline."""
        now = time.monotonic()
        for slot in self.all:
            if slot.call is not None and now > slot.deadline:
                self._fail_late(slot)

    def _fail_late(self, slot: ActorSlot) -> None:
        why = "an environment that hangs, or too small a time limit"
        if slot.work == "process_location":
            why = (
                "its process hangs in its start: a library that is never loaded, or a file system that does not answer"
            )
        self.fail(slot, "timeout", TimeoutError(why))

    def _lose(self, slot: ActorSlot, node_id: str, error: Exception) -> None:
        """Replace an actor that is out of reach; ``_judge_lost`` finds out why."""
        wait = backoff_seconds(slot.failures + 1)
        lost = LostActor(slot, slot.answers, node_id, self._name(slot), error, time.monotonic())
        log.warning("%s is out of reach and will be replaced in %.1f s: %s", lost.name, wait, error)
        self._lost.append(lost)
        self._begin_recovery(slot)
        self.kill(slot)
        slot.back_at = time.monotonic() + wait

    def _judge_lost(self, lost_before: float) -> None:
        """Count the replacement of lost actors whose nodes have ended, and of those that were lost before this time.

        Raises:
            NoAnswer: from the head.
            TooManyFailures: this was one failure too many.
        """
        living = {node.node_id for node in living_nodes()} if self._lost else set()
        for lost in list(self._lost):
            if lost.node_id not in living:
                self._lost.remove(lost)
                self._report("node_died", f"{lost.name} was lost with its node {lost.node_id[:8]} (node_died)")
            elif lost.since < lost_before:
                self._lost.remove(lost)
                text = in_short(lost.error)
                self._report("died", f"{lost.name} was lost (died), and its node {lost.node_id[:8]} lives: {text}")
                # As after any failure: a call that was finished since ends the row.
                lost.slot.failures += lost.answers == lost.slot.answers
                self._check_failures(lost.slot, "died", text, lost.error)

    def _begin_recovery(self, slot: ActorSlot) -> None:
        if slot.failed_at is None:
            slot.failed_at, slot.unplaced_seconds = time.monotonic(), 0.0

    def fail(self, slot: ActorSlot, reason: ReplacementReason, error: Exception) -> None:
        """End the actor slot's actor; another will come after a pause that grows with every failure."""
        self._begin_recovery(slot)
        self.kill(slot, at_once=reason == "timeout")
        slot.failures += reason not in BLAMELESS
        text = in_short(error)
        if "\n" in str(error):
            log.info("%s %s, as Ray tells it: %s: %s", self._title, slot.actor, type(error).__name__, error)
        if reason == "oom":
            text = f"its node ran out of memory: use fewer slots (env.num_envs) or actors per node; {text}"
        elif reason == "object_store":
            text = (
                "its node's object store is full and has no disk to spill to: free some there, give it more "
                f"(ray start --object-store-memory), or make unrolls smaller (env.num_envs); {text}"
            )
        wait = backoff_seconds(slot.failures)
        if isinstance(error, MISSING) and not self._one_was_up:
            self.restarts[reason] += 1
            raise TooManyFailures(
                f"{self._title} {slot.actor} cannot start, now or later: {text}; install it wherever actors are, or "
                "send it there (cluster.runtime_env)"
            ) from error
        if slot.failures >= self._max_failures:
            self.restarts[reason] += 1
        self._check_failures(slot, reason, text, error)
        slot.back_at = time.monotonic() + wait
        self._report(reason, f"{self._name(slot)} will be replaced in {wait:.1f} s ({reason}): {text}")

    def _check_failures(self, slot: ActorSlot, reason: ReplacementReason, text: str, error: Exception) -> None:
        if slot.failures >= self._max_failures:
            raise TooManyFailures(
                f"{self._title} {slot.actor} failed {slot.failures} times in a row ({reason}); the last error: {text}"
            ) from error

    def _name(self, slot: ActorSlot) -> str:
        return f"{self._title} {slot.actor} (restart index {slot.restart_index})"

    def _report(self, reason: ReplacementReason, message: str) -> None:
        self.restarts[reason] += 1
        self.replaced.append((reason, message))
        log.warning("%s", message)

    def kill(self, slot: ActorSlot, *, at_once: bool = False) -> None:
        """End the actor slot's actor; work under way is lost. ``at_once``: by SIGKILL."""
        if slot.built and slot.call is not None:
            self._on_lost(slot)
        self._end(slot, at_once=at_once)

    def close(self) -> None:
        """Kill all actors. Their work in flight does not count as lost: the run is over."""
        with contextlib.suppress(Exception):  # the run is over: of Ray, which may be lost itself, nothing else is known
            self._judge_lost(math.inf)
        self.restarts.update("died" for _ in self._lost)
        self._lost.clear()
        for slot in self.all:
            self._end(slot)

    def _end(self, slot: ActorSlot, *, at_once: bool = False) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
            if at_once and slot.process_location is not None:
                end_process(slot.process_location)
        slot.handle = slot.process_location = slot.call = None
        slot.built = False


def _unplaced_seconds(waited: float, place: ProcessLocation) -> float:
    """How long an actor had no place that was ``waited`` for, in seconds, and is in a process of that age."""
    if place.age_seconds is None:
        return 0.0
    # A process that was there before has been idle: the actor begins as soon as it has its place.
    return waited - place.age_seconds if place.age_seconds < waited else waited


def _reason(error: RayError) -> ReplacementReason:
    if isinstance(error, RayActorError) and error.preempted:
        return "preempted"
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "OutOfMemoryError" in text or "running low on memory" in text:
        return "oom"
    # Ray says so in words only, once it has given the node up; up to then the actor is unavailable.
    if isinstance(error, NodeDiedError) or "its node has died" in text:
        return "node_died"
    return "died"
