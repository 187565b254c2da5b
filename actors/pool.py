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
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

log = logging.getLogger(__name__)

_RESTART_INDEX_BITS = 16
MOST_REPORTED = 100
"""Replacements kept until they are reported."""
MOST_REFUSED = 3
"""Deliveries of one actor in a row that are refused before it is replaced: what it holds may be damaged for good."""
FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 30.0

ActorState = Literal["up", "starting", "unplaced", "pausing"]
"""The state of an actor. ``up``: it can make unrolls. ``starting``: its process makes policy and environments.
``unplaced``: it waits for a place in the cluster, or for its process to report its location. ``pausing``: it failed,
and its replacement starts after a pause."""


ReplacementReason = Literal["error", "timeout", "died", "oom", "object_store", "refused", "node_died", "preempted"]
"""Why an actor is replaced. ``error``: it raised. ``timeout``: a call took too long. ``died``: its process ended.
``oom``: its node ran out of memory. ``object_store``: its node's object store was full. ``refused``: its deliveries
were. ``node_died``: its node failed. ``preempted``: its node is being shut down."""


@dataclasses.dataclass(slots=True)
class Recoveries:
    """Number and duration of recoveries, each from the detection of a failure until the replacement is up.

    What the replacement waits for a place in a cluster is not counted: that is how long other nodes take to come.
    """

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


def backoff_seconds(failures: int) -> float:
    """The pause before the replacement that follows so many failures in a row."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** max(failures - 1, 0), LAST_BACKOFF_SECONDS)


class RefusedDeliveries(RuntimeError):
    """An actor delivered again and again what the learner refuses."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{MOST_REFUSED} deliveries in a row were refused; the last one: {why}")


class Worker(Protocol):
    """What a pool runs: ``actors.rollout.RolloutWorker``, or ``actors.teams.TeamWorker`` for several policies."""

    def rollout(self, weights: Any) -> Any:
        """One unroll with the weights that the sink gave, as the sink takes it."""

    def get_state(self) -> dict[str, Any]:
        """All that decides later unrolls, as plain data."""

    def set_state(self, state: Any) -> dict[int, str]:
        """Go on from ``get_state``; return the slots that begin an episode instead, each with the reason."""

    def close(self) -> None:
        """Close the environments."""


class Setup(Protocol):
    """Makes the workers of a pool: ``actors.worker_setup.WorkerSetup`` or ``actors.teams.TeamSetup``."""

    @property
    def num_envs(self) -> int:
        """Slots of every worker."""

    def make_worker(self, actor: int, restart_index: int) -> Worker:
        """The worker of one actor; every (actor, restart index) has random streams of its own."""


class TrajectorySink(Protocol):
    """The learner's side of a pool: admits unrolls and takes finished ones."""

    def admit(self, idle: Sequence[int]) -> tuple[int, Any] | None:
        """Choose one of the idle actors: (actor, the newest weights); None where none may start an unroll now.

        Its unroll is in flight then, until ``deliver`` or ``abandon``.
        """

    def deliver(self, actor: int, payload: Any) -> str | None:
        """Hand over a finished unroll, as the worker returned it; why it is refused, None where it is taken."""

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
        setup: Setup,
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
        self._refused: Counter[int] = Counter()
        """Refused deliveries in a row, by actor."""
        self._workers = {actor: setup.make_worker(actor, self._restart_indices[actor]) for actor in actors}
        self._lost: dict[int, float] = {}
        """The monotonic time of its failure, for every worker whose replacement could not be made yet."""
        self._back_at: dict[int, float] = {}
        """The end of the pause before the next try, for these."""
        self._failed_at_save: dict[int, Exception] = {}
        """What a worker raised that was asked for its state; it is replaced by the next ``pump``."""
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
        return Counter({"up": len(self._workers), "pausing": len(self._lost)})

    def pump(self, timeout: float) -> None:
        """One unroll of every worker that is admitted.

        waits for: environments; where no worker is left, ``timeout`` seconds or the end of a pause

        Raises:
            Exception: what a worker, or the making of its replacement, raised ``max_consecutive_failures`` times in a
                row.
        """
        while self._failed_at_save:
            actor, failure = self._failed_at_save.popitem()
            self._fail(actor, "error", failure)
        for actor in [actor for actor, back_at in self._back_at.items() if time.monotonic() >= back_at]:
            self._make_replacement(actor)
        if not self._workers:
            time.sleep(min(timeout, 0.01))
            return
        idle = list(self._workers)
        while (admitted := self._sink.admit(idle)) is not None:
            actor, weights = admitted
            idle.remove(actor)
            try:
                payload = self._workers[actor].rollout(weights)
            except Exception as error:  # noqa: BLE001  (environments raise anything)
                self._sink.abandon(actor)
                self._fail(actor, "error", error)
            else:
                self._deliver(actor, payload)

    def get_state(self) -> dict[str, Any]:
        """The workers' states by actor, as plain data; between two calls of ``pump``.

        A worker that fails at it costs its own state: the weights are saved all the same, and it is replaced later.
        """
        states = {}
        for actor, worker in self._workers.items():
            try:
                states[str(actor)] = worker.get_state()
            except Exception as error:  # noqa: BLE001  (environments raise anything)
                self._failed_at_save[actor] = error
                log.warning(
                    "the environments of actor %d do not say their state, so a run resumed from this checkpoint begins "
                    "their episodes anew: %s: %s",
                    actor,
                    type(error).__name__,
                    error,
                )
        return states

    def set_state(self, state: Mapping[str, Any]) -> dict[tuple[int, int], str]:
        """Go on from ``get_state`` of an equal pool, before the first call of ``pump``.

        Return the slots that begin an episode instead, as (actor, slot), each with the reason. A worker that fails at
        it is replaced, as after any failure.

        Raises:
            Exception: as ``pump``.
        """
        begun: dict[tuple[int, int], str] = {}
        for actor, worker in list(self._workers.items()):
            try:
                failed = worker.set_state(state.get(str(actor)))
            except Exception as error:  # noqa: BLE001  (environments raise anything)
                failed = dict.fromkeys(range(self._setup.num_envs), f"{type(error).__name__}: {error}")
                self._fail(actor, "error", error)
            begun |= {(actor, slot): why for slot, why in failed.items()}
        return begun

    def _deliver(self, actor: int, payload: Any) -> None:
        why = self._sink.deliver(actor, payload)
        if why is None:
            self._failures[actor] = self._refused[actor] = 0
            return
        self._refused[actor] += 1
        if self._refused[actor] >= MOST_REFUSED:
            self._refused[actor] = 0
            self._fail(actor, "refused", RefusedDeliveries(why))

    def _fail(self, actor: int, reason: ReplacementReason, error: Exception) -> None:
        self._count_failure(actor, reason, f"the worker of actor {actor} is replaced", error)
        self._replace(actor)

    def _count_failure(self, actor: int, reason: ReplacementReason, what: str, error: Exception) -> None:
        self._failures[actor] += 1
        if self._failures[actor] >= self._max_failures:
            raise error
        message = f"{what}: {type(error).__name__}: {error}"
        self.replaced.append((reason, message))
        log.warning("%s", message)
        self.restarts[reason] += 1

    def _replace(self, actor: int) -> None:
        self._lost[actor] = time.monotonic()
        worker = self._workers.pop(actor)
        with contextlib.suppress(Exception):  # what failed may not even be closable
            worker.close()
        self._make_replacement(actor)

    def _make_replacement(self, actor: int) -> None:
        """Put a new worker into the place of a lost one, or pause before the next try."""
        self._restart_indices[actor] += 1
        try:
            worker = self._setup.make_worker(actor, self._restart_indices[actor])
        except Exception as error:  # noqa: BLE001  (environments raise anything)
            self._count_failure(
                actor, "error", f"a replacement of actor {actor} could not be made, another follows", error
            )
            self._back_at[actor] = time.monotonic() + backoff_seconds(self._failures[actor])
            return
        self._back_at.pop(actor, None)
        self._workers[actor] = worker
        self._workers = dict(sorted(self._workers.items()))
        self.recoveries.add(time.monotonic() - self._lost.pop(actor))

    def close(self) -> None:
        """Close all environments."""
        for worker in self._workers.values():
            worker.close()
