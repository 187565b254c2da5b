"""Peer learners as Ray actors: started, grouped, called for every update, replaced when they fail.

A new group is made between two updates whenever a learner came or went. While a learner is being replaced the others go
on without it, and an update is smaller by its part.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import ray
from ray.exceptions import RayError
from shoal.actors.config import ActorConfig
from shoal.actors.pool import Recoveries
from shoal.actors.ray_pool import ACTOR_OPTIONS, describe, state_of
from shoal.actors.supervisor import BUILD_TIMEOUT_SECONDS, ActorSlot, Supervisor
from shoal.deploy.cluster.learner_actor import LearnerActor
from shoal.deploy.cluster.ray_session import RaySession
from shoal.deploy.placement.layout import Layout
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.learner.group import LearnerGroup, LearnerLost, open_store, use_interface
from shoal.learner.learner import Learner
from shoal.learner.learners import PeerResult, take_trained
from shoal.learner.ledger import DropReason, Ledger
from shoal.learner.recorder import Recorded

log = logging.getLogger(__name__)

RECORDED_SECONDS = 10.0
"""How long peers may take to hand over what they recorded, all of them together: the run may be ending."""
GRACE_SECONDS = 10.0
"""Extra time for healthy learners to report that they lost the group: when one hangs, all hang with it."""


class RayPeers:
    """``learner.learners.PeerLearners``. Rank 0 is the run's own learner; the others hold the actor slots 1, 2, ...

    Not thread-safe: only the training loop calls it, and after the loop its caller calls ``close``.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        layout: Layout,
        config: ActorConfig,
        session: RaySession,
        *,
        on_lost_update: Callable[[], None],
        on_lost_steps: Callable[[int, DropReason], None],
    ) -> None:
        self._address, self._watch = session.address, session.watch
        self._left_behind = False
        """A call that makes a group may still go on in another thread."""
        use_interface(self._address)
        remote = ray.remote(**ACTOR_OPTIONS, **session.learner_options)(LearnerActor)
        self._on_lost_steps = on_lost_steps
        self._in_flight: Counter[tuple[int, int]] = Counter()
        """Steps that wait for their update, by learner and restart index."""
        self._ended: list[tuple[int, int]] = []
        """Learners that gave no answer to the last update."""
        self._actors_alive: dict[tuple[int, int], int] = {}
        """Rollout workers of each learner, as of its last update."""
        self._lags: dict[tuple[int, int], tuple[int, ...]] = {}
        self._late: dict[tuple[int, int], int] = {}
        self._num_actors = {rank: len(layout.share(rank).actors) for rank in range(1, layout.num_learners)}
        fed = setup.rollout_processes is not None
        self._restarts: Counter[str] = Counter()
        self._timeout = config.unroll_timeout_seconds
        self._members: list[tuple[ActorSlot, int]] = []
        """Actor slots of the group with their restart indices, in the order of their ranks."""
        self._group: LearnerGroup | None = None
        self._generation = -1
        self._supervisor = Supervisor(
            range(1, layout.num_learners),
            title="learner",
            make=lambda rank, restart_index: remote.remote(setup, layout.share(rank), restart_index),
            needs=describe(session.learner_options),
            call_timeout_seconds=self._timeout + GRACE_SECONDS,
            max_consecutive_failures=config.max_consecutive_failures,
            on_lost=lambda slot: on_lost_update() if slot.work == "step" else None,
            # A learner with rollout actors waits for the first of them, which waits for free resources.
            build_timeout_seconds=math.inf if fed else BUILD_TIMEOUT_SECONDS,
        )

    @property
    def restarts(self) -> Counter[str]:
        """Number of replaced learners, and of replaced rollout workers of theirs, by reason."""
        return self._supervisor.restarts + self._restarts

    @property
    def recoveries(self) -> Recoveries:
        """Number and duration of the replacements of learners."""
        return self._supervisor.recoveries

    @property
    def num_actors_alive(self) -> int:
        """Rollout workers that can make unrolls, as of the last update."""
        return sum(self._actors_alive.values())

    @property
    def actor_states(self) -> Counter[str]:
        """Rollout workers by ``actors.pool.ActorState``, as of the last update."""
        states: Counter[str] = Counter()
        alive = dict(self._actors_alive)
        for slot in self._supervisor.all:
            up = alive.get((slot.actor, slot.restart_index), 0)
            states["up"] += up
            # A learner that is up reports only its rollout workers that are up; the rest are starting.
            states["starting" if slot.built else state_of(slot)] += self._num_actors[slot.actor] - up
        return states

    @property
    def lags(self) -> list[int]:
        """Policy lag of every unroll under way at the last update: the versions made since it began."""
        return [lag for lags in list(self._lags.values()) for lag in lags]

    @property
    def late_unrolls(self) -> int:
        """Unrolls that were too old to be trained while they were under way, at the last update."""
        return sum(list(self._late.values()))

    @property
    def out_of_reach(self) -> threading.Event:
        """Set when Ray is lost."""
        return self._watch.lost

    def process_ids(self) -> list[int]:
        """Process ids of the learners that are up."""
        return self._supervisor.process_ids()

    def begin(self, learner: Learner, stop: threading.Event, env_options: Mapping[str, Any] | None) -> None:
        """Start every peer's part in the next update; if a learner came or went, make a new group before it.

        ``env_options`` go with the weights that they publish after it.

        waits for: at the run's start all learners, later none     unblocked by: a start, a death, ``stop``, Ray's end

        Raises:
            TooManyFailures: a learner failed ``actor.max_consecutive_failures`` times in a row.
        """
        if self._watch.out_of_reach():
            return
        self._watch.call(self._begin, learner, stop, env_options)
        self._left_behind = self._watch.lost.is_set()

    def _begin(self, learner: Learner, stop: threading.Event, env_options: Mapping[str, Any] | None) -> None:
        self._supervisor.start_due()
        while self._take_in_started() and self._generation < 0 and not stop.is_set():
            time.sleep(0.02)
            self._supervisor.start_due()
        present = [(slot, slot.restart_index) for slot in self._supervisor.up()]
        self._write_off("learner_lost", {(slot.actor, restart_index) for slot, restart_index in present})
        if self._group is None or present != self._members:
            self._regroup(learner, present)
        for slot, _ in self._members:
            self._supervisor.call(slot, "step", env_options)

    def end(self) -> Sequence[PeerResult]:
        """The results of the update that was begun; a learner that failed in it has none.

        Raises:
            TooManyFailures: a learner failed ``actor.max_consecutive_failures`` times in a row.
        """
        answers: list[PeerResult | int | None] = []
        self._watch.call(self._collect, answers)
        came = list(answers)  # fewer than the members where Ray was lost meanwhile
        results = []
        self._ended = []
        for number, (slot, restart_index) in enumerate(self._members):
            who = slot.actor, restart_index
            result = came[number] if number < len(came) else None
            if not isinstance(result, PeerResult):
                self._ended.append(who)
            else:
                results.append(result)
                self._in_flight[who] += result.ledger.in_flight
                self._actors_alive[who] = result.num_alive
                self._lags[who], self._late[who] = result.lags, result.late_unrolls
                for reason, message in result.replaced:
                    self._restarts[reason] += 1
                    log.warning("learner %d: %s", slot.actor, message)
        return results

    def _collect(self, answers: list[PeerResult | int | None]) -> None:
        for slot, _ in self._members:
            answers.append(self._answer(slot))

    def unreported(self, trained: int) -> Ledger:
        """The counts of ``trained`` steps of the last update whose learners ended before they could report them."""
        return take_trained(self._in_flight, self._ended, trained)

    def recorded(self, learner: Learner, attempts: Collection[int]) -> Sequence[Recorded]:
        """The learners' parts in these updates, of those that answer within ``RECORDED_SECONDS``.

        Where Ray is lost, nobody does.
        """
        return self._watch.call(self._recorded, learner, attempts) or ()

    def _recorded(self, learner: Learner, attempts: Collection[int]) -> Sequence[Recorded]:
        # A learner that is in the update still, which ended for rank 0 with an error, leaves it when the group is gone.
        members = [slot for slot, _ in self._members if slot.handle is not None]
        if any(slot.call is not None for slot in members):
            self.separate(learner)
        # An actor makes one call after the other, so these come after the update that may be under way.
        asked = [slot.handle.recorded.remote(tuple(attempts)) for slot in members]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=RECORDED_SECONDS) if asked else ([], [])
        found: list[Recorded] = []
        for answer in ready:
            with contextlib.suppress(RayError):  # of one that died; it is replaced in its turn
                found += ray.get(answer, timeout=RECORDED_SECONDS)
        return found

    def separate(self, learner: Learner) -> None:
        """Leave the group, so that no member waits for a lost one; the next update makes a new group."""
        if self._group is not None:
            self._group.close()
        self._group = learner.group = None

    def close(self) -> None:
        """Kill all peer learners; their work under way is lost."""
        self._watch.call(self._supervisor.close)
        self._write_off("shutdown", set())
        if self._group is not None and not self._left_behind:
            self._group.close()

    def _write_off(self, reason: DropReason, present: AbstractSet[tuple[int, int]]) -> None:
        """Drop the steps that waited at learners that are gone."""
        for who in set(self._in_flight) - present:
            if steps := self._in_flight.pop(who):
                self._on_lost_steps(steps, reason)
        for who in set(self._actors_alive) - present:
            del self._actors_alive[who]
            del self._lags[who], self._late[who]

    def _take_in_started(self) -> bool:
        """Collect the starts that ended; return True while a learner is still starting."""
        starting = {slot.call: slot for slot in self._supervisor.all if not slot.built and slot.call is not None}
        if starting:
            ready, _ = ray.wait(list(starting), num_returns=len(starting), timeout=0)
            for ref in ready:
                self._supervisor.collect(starting[ref])
            self._supervisor.fail_overdue()
        return len(self._supervisor.up()) < len(self._supervisor.all)

    def _regroup(self, learner: Learner, members: list[tuple[ActorSlot, int]]) -> None:
        """Make a group of all ``members`` that can join it."""
        while members:
            self.separate(learner)
            self._generation += 1
            store = open_store(self._address, self._timeout)
            for rank, (slot, _) in enumerate(members, 1):
                self._supervisor.call(
                    slot,
                    "join",
                    self._address,
                    store.port,
                    self._generation,
                    rank,
                    len(members) + 1,
                    self._timeout,
                )
            try:
                self._group = LearnerGroup(
                    store,
                    device=learner.path.device,
                    generation=self._generation,
                    rank=0,
                    size=len(members) + 1,
                    timeout_seconds=self._timeout,
                    out_of_reach=self._watch.lost,
                )
                learner.synchronize(self._group)
            except LearnerLost:
                self.separate(learner)
            joined = [member for member in members if self._answer(member[0]) is not None]
            if joined == members and self._group is not None:
                break
            members = joined
        self._members = members

    def _answer(self, slot: ActorSlot) -> PeerResult | int | None:
        """The result of a call under way; None where the actor slot failed."""
        if slot.call is None:
            return None
        return self._supervisor.answer(slot)
