"""Admission: which idle actor starts the next unroll, and whether it may start now.

Who has waited longest is next. Admission keeps data fresh: an unroll may start only if, as far as the durations that
were measured tell, it will be trained within ``max_policy_lag`` versions. No data is thrown away to keep up; a slow
learner makes actors wait.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from shoal.learner.mailbox import Place
from shoal.learner.near_future import UnderWay, in_time

log = logging.getLogger(__name__)

MEASURED = 5
"""Latest durations, of an actor's unrolls and of updates, that expectations are made of."""
PATIENCE = 2.0
"""An unroll of an actor that is too slow for the lag is trained unless it takes this many times its longest of late."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unroll:
    """An unroll under way or delivered."""

    serial: int
    """Number of the admission: earlier ones are trained first."""
    policy_version: int
    """The version that it acts with."""
    begun_at: float
    trained_until: float | None = None
    """None: it is trained within ``max_policy_lag`` versions. Else its actor is too slow for that, always or at times,
    and it is trained whatever its lag is if it comes back by this time."""
    in_turn: bool = True
    """It is expected in time, and comes before those that begin later."""


class Durations:
    """The latest durations of something that happens again and again."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MEASURED)
        self.usual = 0.0
        """The mean, in seconds; 0 before the first."""
        self.shortest = self.longest = 0.0
        """In seconds; 0 before the first."""

    def add(self, seconds: float) -> None:
        """Add the latest one."""
        self._seconds.append(seconds)
        self.usual = sum(self._seconds) / len(self._seconds)
        self.shortest, self.longest = min(self._seconds), max(self._seconds)


class Admission:
    """The unrolls under way; it holds no lock (``learner.trajectory_queue`` has one for all its parts).

    Rates under a learner that is slower than its actors: an actor whose unroll takes d and that waits W for its turn
    makes 1/(d + W) unrolls per second. In a fair division nobody could have more than 1/max(d, W), so that everybody
    has at least half of its fair share, whatever the durations.

    Args:
        num_actors: actors that share the admissions in lock step.
        num_envs: slots per unroll.
        batch_size: segments per update; a multiple of ``num_envs``.
        max_policy_lag: versions that may pass between acting and training; 0 is lock step.
        clock: seconds from any origin. One that stands still makes all decisions independent of time: right where one
            thread acts and learns in turn.
    """

    def __init__(
        self, *, num_actors: int, num_envs: int, batch_size: int, max_policy_lag: int, clock: Callable[[], float]
    ) -> None:
        self._per_batch, self.max_policy_lag, self._clock = batch_size // num_envs, max_policy_lag, clock
        # In lock step every actor makes the same number of unrolls per version: which data an update sees must not
        # depend on who was faster.
        self._quota = self._per_batch // num_actors if max_policy_lag == 0 else None
        self._admitted: Counter[int] = Counter()
        """Unrolls by actor since the last version."""
        self._version = -1
        """That version; -1 before the first."""
        self._next_serial = 0
        self._under_way: dict[int, Unroll] = {}
        """By actor."""
        self._waiting: dict[int, float] = {}
        """The time since when an idle actor waits, longest first."""
        self._passed_over: dict[int, float] = {}
        """The time since when others are admitted before an idle actor, because its unroll would not be in time."""
        self._durations: dict[int, Durations] = {}
        """Of the latest unrolls, by actor."""
        self._too_slow: dict[int, float] = {}
        """Expected seconds, when this was found, of an unroll of an actor that is too slow for the lag."""
        self._slow_at_times: set[int] = set()
        """Actors of which that was said."""
        self._updates = Durations()
        self._update_began: float | None = None
        """None where no update is under way."""

    @property
    def lock_step(self) -> bool:
        """Whether every actor makes the same number of unrolls per version."""
        return self._quota is not None

    def admit(self, idle: Sequence[int], policy_version: int, delivered: int) -> int | None:
        """Choose one of the ``idle`` actors to start an unroll with ``policy_version``; it is under way then.

        None where none of them may start now. ``delivered`` trajectories wait for their update.
        """
        now = self._clock()
        for actor in idle:
            self._waiting.setdefault(actor, now)
        ahead = delivered + len(self._under_way)
        if self._updating + ahead // self._per_batch > self.max_policy_lag:
            return None
        offered = set(idle)
        queue = [actor for actor in self._waiting if actor in offered]
        for actor in queue:
            own = self._durations.get(actor)
            trained_until, in_turn = None, True
            if self._quota is not None:
                if self._admitted[actor] >= self._quota:
                    continue
            elif own is None or self._in_time(actor, own.longest, now, delivered, queue):
                self._find_fast_again(actor)
            elif self._in_time(actor, own.shortest, now, delivered, queue):
                # Its long unrolls are trained, too: they may be those of other states than its short ones.
                trained_until = now + PATIENCE * own.longest
            elif self._may_be_late(actor, now):
                trained_until, in_turn = now + PATIENCE * own.longest, False
            else:
                continue  # it is another one's turn; with fewer unrolls ahead this one may be in time
            self._begin(actor, Unroll(self._serial(), policy_version, now, trained_until, in_turn))
            return actor
        return None

    def begin(self, actor: int, policy_version: int) -> None:
        """An unroll of ``actor`` starts with ``policy_version``, because another admission decided so."""
        self._begin(actor, Unroll(self._serial(), policy_version, self._clock()))

    def _begin(self, actor: int, unroll: Unroll) -> None:
        self._waiting.pop(actor, None)
        self._passed_over.pop(actor, None)
        self._admitted[actor] += 1
        self._under_way[actor] = unroll

    def came_back(self, actor: int) -> Unroll | None:
        """The unroll of ``actor`` that was delivered; None where none was under way."""
        unroll = self._under_way.pop(actor, None)
        if unroll is not None:
            self._durations.setdefault(actor, Durations()).add(self._clock() - unroll.begun_at)
        return unroll

    def refused(self, actor: int) -> None:
        """What ``actor`` delivered was no trajectory: it may make another one instead."""
        self._admitted[actor] -= 1

    def abandoned(self, actor: int) -> None:
        """The unroll of ``actor`` will never be delivered; its successor may make one instead."""
        if self._under_way.pop(actor, None) is not None:
            self._admitted[actor] -= 1
        # The successor may run on another machine.
        self._durations.pop(actor, None)
        self._too_slow.pop(actor, None)

    def place(self, actor: int, unroll: Unroll, policy_version: int) -> Place:
        """The place in the mailbox of an ``unroll`` of ``actor`` that came back at ``policy_version``."""
        latest = unroll.policy_version + self.max_policy_lag
        # The batch under way is made up already: the next one is taken one version later.
        late = policy_version + self._updating > latest
        if unroll.trained_until is None or self._clock() > unroll.trained_until or (unroll.in_turn and not late):
            return Place((unroll.policy_version, unroll.serial), latest)
        if unroll.in_turn and actor not in self._slow_at_times:
            self._slow_at_times.add(actor)
            log.warning(
                "actor %d is at times too slow for actor.max_policy_lag=%d: an unroll took %.3g s, where its quickest "
                "of late took %.3g s, and the learner made %d versions meanwhile. They are trained all the same. "
                "Raise actor.max_policy_lag, shorten actor.unroll_length, or find out what makes them slow",
                actor,
                self.max_policy_lag,
                self._clock() - unroll.begun_at,
                self._durations[actor].shortest,
                policy_version - unroll.policy_version,
            )
        # Behind those that began before now: they are still to be in time.
        return Place((policy_version, self._serial()), None)

    def update_began(self) -> None:
        """A batch was taken for an update: an unroll that starts now is trained one version later."""
        self._update_began = self._clock()

    def published(self, policy_version: int) -> None:
        """Weights are out; the update is over if one was under way."""
        if self._update_began is not None:
            self._updates.add(self._clock() - self._update_began)
        if self._update_began is not None or policy_version != self._version:
            self._admitted.clear()
        self._update_began, self._version = None, policy_version

    def lags(self, policy_version: int) -> list[int]:
        """Policy lag of every unroll under way: the versions made since it began."""
        return [policy_version - unroll.policy_version for unroll in self._under_way.values()]

    def late(self, policy_version: int) -> int:
        """Number of unrolls under way that will be too old to be trained when they come back."""
        now = self._clock()
        return sum(
            policy_version - unroll.policy_version > self.max_policy_lag
            and (unroll.trained_until is None or now > unroll.trained_until)
            for unroll in self._under_way.values()
        )

    def get_state(self) -> dict[str, Any]:
        """What later decisions depend on where the clock stands still, as plain data; with no unroll under way."""
        assert not self._under_way
        return {
            "next_serial": self._next_serial,
            "version": self._version,
            "admitted": [[actor, unrolls] for actor, unrolls in self._admitted.items()],
            "waiting": list(self._waiting),
        }

    def set_state(self, state: Any) -> None:
        """Go on from ``get_state``, before the first call.

        Raises:
            ValueError: it is no such state.
        """
        numbers = [state["next_serial"], state["version"], *state["waiting"]]
        if not all(type(number) is int for number in [*numbers, *(n for pair in state["admitted"] for n in pair)]):
            raise ValueError("the state of the admissions is damaged")
        self._next_serial, self._version = state["next_serial"], state["version"]
        self._admitted = Counter(dict(state["admitted"]))
        self._waiting = dict.fromkeys(state["waiting"], self._clock())

    def _serial(self) -> int:
        self._next_serial += 1
        return self._next_serial - 1

    @property
    def _updating(self) -> bool:
        return self._update_began is not None

    def _in_time(self, actor: int, seconds: float, now: float, delivered: int, queue: Sequence[int]) -> bool:
        """Whether an unroll of ``actor`` that starts now, and takes so many ``seconds``, is in time."""
        own = self._durations[actor]
        if own.usual == 0:
            return True  # the clock stands still, so that nobody overtakes it

        def usual(other: int) -> float:
            return self._durations.get(other, own).usual

        update = self._updates.usual
        return in_time(
            duration=seconds,
            under_way=[
                UnderWay(max(0.0, unroll.begun_at + usual(other) - now), unroll.in_turn, usual(other))
                for other, unroll in self._under_way.items()
            ],
            idle=[usual(other) for other in queue if other != actor],
            delivered=delivered,
            per_batch=self._per_batch,
            max_policy_lag=self.max_policy_lag,
            update_seconds=update,
            update_left=None if self._update_began is None else max(0.0, self._update_began + update - now),
        )

    def _may_be_late(self, actor: int, now: float) -> bool:
        """Whether an ``actor`` that would not be in time may start all the same, because it is too slow for the lag.

        That is found, and said, once others were admitted before it for as long as one of its unrolls takes.
        """
        own = self._durations[actor]
        expected = own.usual
        if actor not in self._too_slow:
            if now - self._passed_over.setdefault(actor, now) < expected:
                return False
            self._too_slow[actor] = expected
            log.warning(
                "actor %d is too slow for actor.max_policy_lag=%d: its unrolls take %.3g s, and the learner makes more "
                "versions meanwhile (an update takes %.3g s). They are trained all the same, however many versions "
                "old, unless they take longer than %.3g s. Raise actor.max_policy_lag, shorten actor.unroll_length, or "
                "find out what makes this actor slow",
                actor,
                self.max_policy_lag,
                expected,
                self._updates.usual,
                PATIENCE * own.longest,
            )
        return True

    def _find_fast_again(self, actor: int) -> None:
        """Forget that ``actor`` was too slow for the lag, if its unrolls take half as long as when that was found."""
        if actor in self._too_slow and self._durations[actor].usual < self._too_slow[actor] / 2:
            del self._too_slow[actor]
