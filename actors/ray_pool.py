"""The pool of Ray actors: rollout workers in processes of their own; the dead and the hung are replaced."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import ray
from shoal.actors.config import ActorConfig
from shoal.actors.pool import MOST_REFUSED, ActorState, Recoveries, RefusedDeliveries, TrajectorySink
from shoal.actors.ray_actor import RolloutActor
from shoal.actors.supervisor import ActorSlot, Supervisor
from shoal.actors.teams import TeamSetup
from shoal.actors.worker_setup import WorkerSetup

ACTOR_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        # A replacement is made here, where it is counted and gets a restart index of its own.
        "max_restarts": 0,
        "max_task_retries": 0,
        # Ray's head would remember every call of a run: hundreds of megabytes an hour with short unrolls.
        "enable_task_events": False,
    }
)
"""Ray options of every actor of a run, whatever its resources."""
_OWN_REFERENCES = 3
"""To a payload that nobody reads: of the list, of the variable that goes through it, and of ``sys.getrefcount``."""
_left: list[np.ndarray] = []
"""Unrolls whose raylet ended before them, for as long as this process lives."""


class RayPool:
    """Rollout workers as Ray actors.

    Args:
        actors: their indices in the run.
        options: Ray options of every actor: resources and placement (``deploy.cluster.ray_session``).
        first_restart_index: of every actor's first process; higher than those of an earlier pool of the same run.
        out_of_reach: tells at once whether Ray's raylet has ended.

    Not thread-safe: ``pump`` and ``close`` are called from one thread, or one after the other.
    """

    def __init__(
        self,
        setup: WorkerSetup | TeamSetup,
        actors: range,
        config: ActorConfig,
        sink: TrajectorySink,
        options: Mapping[str, Any],
        *,
        first_restart_index: int = 0,
        out_of_reach: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sink, self._out_of_reach = sink, out_of_reach
        self._delivered: list[np.ndarray] = []
        """Unrolls in Ray's store that are read or were lately. Ray ends a process that lets go of one where the raylet
        is gone, so that nobody but this pool is ever the last to do so."""
        self._refused: Counter[int] = Counter()
        """Refused deliveries in a row, by actor."""
        remote = ray.remote(**ACTOR_OPTIONS, **options)(RolloutActor)
        self._supervisor = Supervisor(
            actors,
            title="actor",
            make=lambda actor, restart_index: remote.remote(setup, actor, first_restart_index + restart_index),
            needs=describe(options),
            call_timeout_seconds=config.unroll_timeout_seconds,
            max_consecutive_failures=config.max_consecutive_failures,
            on_lost=lambda slot: sink.abandon(slot.actor),
        )

    @property
    def restarts(self) -> Counter[str]:
        """Actors replaced, by reason."""
        return self._supervisor.restarts

    @property
    def num_alive(self) -> int:
        """Actors that are up."""
        return len(self._supervisor.up())

    @property
    def states(self) -> Counter[ActorState]:
        """Number of actors by state."""
        return Counter(state_of(slot) for slot in self._supervisor.all)

    @property
    def recoveries(self) -> Recoveries:
        """How long replacements took."""
        return self._supervisor.recoveries

    @property
    def replaced(self) -> deque[tuple[str, str]]:
        """The latest replacements (``Supervisor.replaced``)."""
        return self._supervisor.replaced

    def process_ids(self) -> list[int]:
        """Process ids of the actors that are up."""
        return self._supervisor.process_ids()

    def pump(self, timeout: float) -> None:
        """Replace actors whose pause is over, start admitted unrolls, deliver finished ones.

        waits for: any unroll under way, at most ``timeout`` seconds     unblocked by: an actor finishing or dying

        Raises:
            TooManyFailures: an actor failed ``max_consecutive_failures`` times in a row.
        """
        self._let_go()
        supervisor = self._supervisor
        supervisor.start_due()
        # An actor that is still starting would act with weights that are old when it is up.
        idle = {slot.actor: slot for slot in supervisor.up() if slot.call is None and not supervisor.must_leave(slot)}
        while idle and (admitted := self._sink.admit(list(idle))) is not None:
            actor, weights = admitted
            supervisor.call(idle.pop(actor), "rollout", weights)
        under_way = {slot.call: slot for slot in supervisor.all if slot.call is not None}
        if not under_way:
            time.sleep(min(timeout, 0.01))
            return
        ready, _ = ray.wait(list(under_way), num_returns=1, timeout=timeout)
        if ready:
            # Whatever else finished meanwhile comes along without a wait of its own.
            ready, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)
        if ready and self._out_of_reach():
            return  # Ray ends a process that reads from the store of a raylet that is gone
        for ref in ready:
            slot = under_way[ref]
            failures = slot.failures
            if (payload := supervisor.collect(slot)) is not None:
                self._deliver(slot, payload, failures)
        supervisor.fail_overdue()

    def _deliver(self, slot: ActorSlot, payload: Any, failures: int) -> None:
        """``failures``: of the actor slot in a row before this answer; one that is refused does not end the row."""
        self._delivered += payload if isinstance(payload, list) else [payload]
        why = self._sink.deliver(slot.actor, payload)
        if why is None:
            self._refused[slot.actor] = 0
            return
        slot.failures = failures
        self._refused[slot.actor] += 1
        if self._refused[slot.actor] >= MOST_REFUSED:
            self._refused[slot.actor] = 0
            self._supervisor.fail(slot, "refused", RefusedDeliveries(why))

    def _let_go(self) -> None:
        """Let go of unrolls that nobody else has any more, while there is a raylet."""
        if self._delivered and not self._out_of_reach():
            self._delivered = [payload for payload in self._delivered if sys.getrefcount(payload) > _OWN_REFERENCES]

    def close(self) -> None:
        """Kill all actors; unrolls under way are dropped unseen."""
        self._supervisor.close()
        if self._out_of_reach():
            _left.extend(self._delivered)


def state_of(slot: ActorSlot) -> ActorState:
    """The state of an actor slot's actor; callable from any thread."""
    if slot.built:
        return "up"
    if slot.handle is None:
        return "pausing"
    return "starting" if slot.process_location else "unplaced"


def describe(options: Mapping[str, Any]) -> str:
    """The resources and labels that these Ray options ask for, in words."""
    amounts = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **options.get("resources", {})}
    parts = [f"{amount:g} {name}" for name, amount in amounts.items() if amount]
    parts += [f"label {name}={value}" for name, value in options.get("label_selector", {}).items()]
    return ", ".join(parts)
