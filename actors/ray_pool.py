"""The pool of Ray actors: rollout workers in processes of their own; the dead and the hung are replaced."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import ray
from shoal.actors.config import ActorConfig
from shoal.actors.pool import Feed, Recoveries, State
from shoal.actors.ray_actor import RolloutActor
from shoal.actors.supervisor import Seat, Seats
from shoal.actors.worker_setup import WorkerSetup


class RayPool:
    """Rollout workers as Ray actors.

    Args:
        actors: their indices in the run.
        options: Ray's, of every actor: what it needs and where it may be (``deploy.cluster.ray_session``).
        first_incarnation: of every actor; higher than those of an earlier pool of the same run.

    Not thread-safe: ``pump`` and ``close`` are called from one thread, or one after the other.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        actors: range,
        config: ActorConfig,
        feed: Feed,
        options: Mapping[str, Any],
        *,
        first_incarnation: int = 0,
    ) -> None:
        self._feed = feed
        # max_restarts 0: a replacement is made here, where it is counted and gets an incarnation of its own.
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(RolloutActor)
        self._seats = Seats(
            actors,
            title="actor",
            make=lambda actor, incarnation: remote.remote(setup, actor, first_incarnation + incarnation),
            needs=describe(options),
            call_timeout_seconds=config.unroll_timeout_seconds,
            max_consecutive_failures=config.max_consecutive_failures,
            on_lost=lambda seat: feed.abandon(seat.actor),
        )

    @property
    def restarts(self) -> Counter[str]:
        """Actors replaced, by reason."""
        return self._seats.restarts

    @property
    def num_alive(self) -> int:
        """Actors that are up."""
        return len(self._seats.up())

    @property
    def states(self) -> Counter[State]:
        """Actors by what they are at."""
        return Counter(state_of(seat) for seat in self._seats.all)

    @property
    def recoveries(self) -> Recoveries:
        """How long replacements took."""
        return self._seats.recoveries

    @property
    def replaced(self) -> deque[tuple[str, str]]:
        """The last that were replaced (``Seats``)."""
        return self._seats.replaced

    def process_ids(self) -> list[int]:
        """Process ids of the actors that are up."""
        return self._seats.process_ids()

    def pump(self, timeout: float) -> None:
        """Replace who is due, start admitted unrolls, deliver finished ones.

        waits for: any unroll under way, at most ``timeout`` seconds     unblocked by: an actor finishing or dying

        Raises:
            TooManyFailures: an actor failed ``max_consecutive_failures`` times in a row.
        """
        seats = self._seats
        seats.start_due()
        for seat in seats.up():
            # An actor that is still starting would act with weights that are old when it is up.
            if (
                seat.call is None
                and not seats.must_leave(seat)
                and (weights := self._feed.admit(seat.actor)) is not None
            ):
                seats.call(seat, "rollout", weights)
        under_way = {seat.call: seat for seat in seats.all if seat.call is not None}
        if not under_way:
            time.sleep(min(timeout, 0.01))
            return
        ready, _ = ray.wait(list(under_way), num_returns=1, timeout=timeout)
        if ready:
            # Whatever else finished meanwhile comes along without a wait of its own.
            ready, _ = ray.wait(list(under_way), num_returns=len(under_way), timeout=0)
        for ref in ready:
            if (payload := seats.collect(under_way[ref])) is not None:
                self._feed.deliver(payload)
        seats.fail_overdue()

    def close(self) -> None:
        """Kill all actors; unrolls under way are dropped unseen."""
        self._seats.close()


def state_of(seat: Seat) -> State:
    """What the actor of a seat is at; from any thread."""
    if seat.built:
        return "up"
    if seat.handle is None:
        return "pausing"
    return "starting" if seat.whereabouts else "unplaced"


def describe(options: Mapping[str, Any]) -> str:
    """What an actor of these options needs, in words."""
    amounts = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **options.get("resources", {})}
    parts = [f"{amount:g} {name}" for name, amount in amounts.items() if amount]
    parts += [f"label {name}={value}" for name, value in options.get("label_selector", {}).items()]
    return ", ".join(parts)
