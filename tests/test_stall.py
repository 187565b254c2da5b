"""A run that makes no update any more says so."""

from __future__ import annotations

from collections import Counter

import pytest
from shoal.deploy.monitoring import stall
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.monitoring.stall import Stall
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics


@pytest.fixture
def statistics() -> RunStatistics:
    return RunStatistics(Ledger(in_flight=1200))


def test_missing_updates_are_said_and_make_a_run_not_ready(
    statistics: RunStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches minutes without an update in which nothing is said and /readyz answers 200."""
    states = Counter(up=1, starting=2, unplaced=0, pausing=1)
    found = Stall(statistics=statistics, states=lambda: states)
    ready = Readiness(
        statistics=statistics,
        actors_alive=lambda: 1,
        stopping=lambda: False,
        max_update_age_seconds=300,
        stalled=found.now,
    )
    statistics.stamp_update()
    assert ready.why_not() is None
    monkeypatch.setattr(stall, "STALLED_SECONDS", 0.0)
    said = ready.why_not()
    assert said is not None
    assert said == found.now()
    assert "1 of 4 actors are up (2 starting, 1 pausing after a failure); 1,200 environment steps wait" in said
    statistics.end()
    assert found.now() is None


def test_updates_that_take_their_time_are_no_stall(statistics: RunStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a warning in every update of a run whose updates take minutes."""
    found = Stall(statistics=statistics, states=Counter)
    monkeypatch.setattr(stall, "STALLED_SECONDS", 0.0)
    assert found.now() is not None  # before the first one, too
    statistics.stamp_update()
    assert statistics.longest_wait == 0
    statistics.stamp_update()
    assert statistics.longest_wait > 0
    statistics.longest_wait = 60.0
    assert found.now() is None
    for _ in range(300):
        statistics.stamp_update()
    assert statistics.longest_wait < 1.0  # one stall does not hide the next for good
