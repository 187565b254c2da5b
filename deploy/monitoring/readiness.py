"""Readiness of a run: it has made an update lately, and actors are alive to collect data for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shoal.learner.statistics import RunStatistics


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """Answers readiness probes, from any thread."""

    statistics: RunStatistics
    actors_alive: Callable[[], int]
    """Number of actors that can make unrolls, including learners that also act."""
    stopping: Callable[[], bool]
    """True once the run has been asked to end."""
    max_update_age_seconds: float
    stalled: Callable[[], str | None] = lambda: None
    """Returns why updates are missing; None while they are made (``Stall``)."""

    def why_not(self) -> str | None:
        """Return the reason why the run is not ready as a sentence, or None if it is ready."""
        if self.statistics.ended or self.stopping():
            return "the run is ending"
        if not self.actors_alive():
            return "no actor can make unrolls"
        age = self.statistics.seconds_since_update
        if age is None:
            return "there was no update yet"
        if age > self.max_update_age_seconds:
            return (
                f"the last update was {age:.0f} seconds ago; metrics.max_update_age_seconds allows "
                f"{self.max_update_age_seconds:g}"
            )
        return self.stalled()
