"""Actors and a learner in simulated time around the real trajectory queue: only durations are made up."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from rollouts import RUN, SMALL, random_columns
from shoal.learner.ledger import Ledger
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import TrajectoryHeader, to_bytes

COLUMNS = random_columns(SMALL, 1, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """An unroll that was made."""

    actor: int
    begun_at: float
    seconds: float
    measured: float
    """The longest of the durations that admission went by; 0 for the first unroll of an actor."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of every unroll."""

    trained: Counter[int] = dataclasses.field(default_factory=Counter)
    """By actor."""
    stale: list[Made] = dataclasses.field(default_factory=list)
    lags: list[int] = dataclasses.field(default_factory=list)
    """Of the trained ones."""
    idle_seconds: float = 0.0
    """Time that the learner had nothing to train."""

    @property
    def made(self) -> Counter[int]:
        """Unrolls that came back, by actor."""
        return self.trained + Counter(unroll.actor for unroll in self.stale)


class Simulation:
    """``duration(actor, now)`` and ``update(now)`` give the seconds of an unroll and of an update that begin now."""

    def __init__(
        self,
        *,
        num_actors: int,
        duration: Callable[[int, float], float],
        update: Callable[[float], float],
        per_batch: int,
        max_policy_lag: int,
    ) -> None:
        self.num_actors, self.per_batch, self.max_policy_lag = num_actors, per_batch, max_policy_lag
        self._duration, self._update = duration, update
        self.now = 0.0
        self.queue = TrajectoryQueue(
            SMALL,
            run_id=RUN,
            num_actors=num_actors,
            num_envs=1,
            batch_size=per_batch,
            max_policy_lag=max_policy_lag,
            ledger=Ledger(),
            clock=lambda: self.now,
        )
        self.outcome = Outcome()
        self.version = 0
        self.under_way: dict[int, Made] = {}
        self.updating = False
        self.measured_since: dict[int, float] = {}
        """The end of the first unroll, by actor."""
        self._events: list[tuple[float, int, int]] = []
        """Times, what began first of what ends then, and the actor whose unroll ends, or -1 for the update."""
        self._begun = itertools.count()
        self._sequence: Counter[int] = Counter()
        self._waiting: dict[tuple[int, int], Made] = {}
        """Delivered and neither trained nor dropped, by actor and sequence number."""

    def run(self, seconds: float, check: Callable[[Simulation], None] = lambda _: None) -> Outcome:
        """Simulate; ``check`` is called whenever everything that may begin has begun."""
        self.queue.publish(0, 0)
        while self.now < seconds:
            self._begin()
            check(self)
            at, _, who = heapq.heappop(self._events)
            if not self.updating:
                self.outcome.idle_seconds += at - self.now
            self.now = at
            self._update_ends() if who < 0 else self._unroll_ends(who)
        assert self.queue.ledger.balance() == 0
        return self.outcome

    def idle(self) -> list[int]:
        """Actors that make no unroll now."""
        return [actor for actor in range(self.num_actors) if actor not in self.under_way]

    @property
    def ahead(self) -> int:
        """Unrolls under way and delivered ones that wait."""
        return len(self.under_way) + self.queue.queued_segments

    def _begin(self) -> None:
        if not self.updating:
            self._take()
        while (admitted := self.queue.admit(self.idle())) is not None:
            actor, _ = admitted
            durations = self.queue._admission._durations.get(actor)
            measured = durations.longest if durations else 0.0
            made = Made(actor, self.now, self._duration(actor, self.now), measured)
            self.under_way[actor] = made
            heapq.heappush(self._events, (self.now + made.seconds, next(self._begun), actor))

    def _take(self) -> None:
        stop = threading.Event()
        batch = self.queue.next_batch(lambda _: stop.set(), stop)
        left = {(t.header.actor, t.header.sequence) for _, t in self.queue._mailbox._waiting}
        trained = {(t.header.actor, t.header.sequence) for t in batch or ()}
        for key in set(self._waiting) - left:
            unroll = self._waiting.pop(key)
            if key not in trained:
                self.outcome.stale.append(unroll)
        if batch is None:
            return
        for trajectory in batch:
            self.outcome.trained[trajectory.header.actor] += 1
            self.outcome.lags.append(self.version - trajectory.header.policy_version)
        self.queue.book(batch, trained=sum(trajectory.env_steps for trajectory in batch))
        self.updating = True
        heapq.heappush(self._events, (self.now + self._update(self.now), -1, -1))

    def _update_ends(self) -> None:
        self.updating = False
        self.version += 1
        self.queue.publish(self.version, self.version)

    def _unroll_ends(self, actor: int) -> None:
        made = self.under_way.pop(actor)
        self.measured_since.setdefault(actor, self.now)
        sequence = self._sequence[actor]
        self._sequence[actor] += 1
        version = self.queue._admission._under_way[actor].policy_version
        header = TrajectoryHeader(run_id=RUN, actor=actor, restart_index=0, sequence=sequence, policy_version=version)
        self._waiting[actor, sequence] = made
        self.queue.deliver(actor, to_bytes(SMALL, header, COLUMNS))


def fair_shares(total: float, most: Sequence[float]) -> list[float]:
    """Divide ``total`` so that nobody has more than his ``most`` and the least is as high as it can be."""
    shares = [0.0] * len(most)
    for rank, actor in enumerate(sorted(range(len(most)), key=lambda one: most[one])):
        shares[actor] = min(most[actor], (total - sum(shares)) / (len(most) - rank))
    return shares
