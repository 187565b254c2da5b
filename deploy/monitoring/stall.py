"""Notices that a run makes no update any more, and says what its actors do meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from shoal.learner.statistics import RunStatistics

STALLED_SECONDS = 45.0
"""No update for so long is a stall."""
TIMES_SLOWER = 3.0
"""But not where updates take their time: only so many times the longest wait for one is a stall."""
_WORDS: Mapping[str, str] = {
    "starting": "starting",
    "unplaced": "without a place or a process",
    "pausing": "pausing after a failure",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stall:
    """Answers from any thread."""

    statistics: RunStatistics
    states: Callable[[], Mapping[str, int]]
    """Number of rollout workers by ``actors.pool.ActorState``."""

    def now(self) -> str | None:
        """What is to be said while updates are missing; None while they are made, and once training is over."""
        statistics = self.statistics
        age = statistics.seconds_since_update
        seconds = statistics.seconds if age is None else age
        if statistics.ended or seconds < max(STALLED_SECONDS, TIMES_SLOWER * statistics.longest_wait):
            return None
        states = self.states()
        others = [f"{states[state]} {words}" for state, words in _WORDS.items() if states.get(state)]
        return (
            f"no update was made for {seconds:.0f} s: {states.get('up', 0)} of {sum(states.values())} actors are up"
            + (f" ({', '.join(others)})" if others else "")
            + f"; {statistics.ledger.in_flight:,} environment steps wait for the next update"
        )
