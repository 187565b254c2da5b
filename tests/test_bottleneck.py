"""The sentence that says what limits a run: right where one stage clearly does."""

from __future__ import annotations

from collections import Counter

import pytest
from shoal.deploy.monitoring import bottleneck as bottleneck
from shoal.deploy.monitoring.bottleneck import STAGES, BottleneckMonitor, judge
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics, StageClock

FED = {"wait": 0.05, "assemble": 0.02, "update": 0.9, "publish": 0.03, "actor_env": 0.6, "actor_policy": 1.2}
STARVED = {"wait": 0.6, "update": 0.38, "publish": 0.02}
ACTING = {"wait": 0.55, "update": 0.43, "publish": 0.02}


@pytest.mark.parametrize(
    ("shares", "acting", "too_late", "stage", "words"),
    [
        (FED, False, 0.0, "learner", "updates take 90% of the learner's time"),
        (
            STARVED | {"actor_env": 1.6, "actor_policy": 0.3},
            False,
            0.0,
            "environment",
            "80% of the actors' time, and the",
        ),
        (STARVED | {"actor_env": 0.2, "actor_policy": 1.6}, False, 0.0, "inference", "waits for them 60% of its own"),
        ({"wait": 0.1, "update": 0.3, "checkpoint": 0.6}, False, 0.0, "transfer", "60% of the learner's time"),
        (FED, False, 0.3, "staleness", "30% of the steps came too late"),
        # Who also acts spends in `wait` what it acts in: it waits for nobody.
        (ACTING | {"actor_env": 0.2, "actor_policy": 0.7}, True, 0.0, "learner", "updates take 43%"),
        (ACTING | {"actor_env": 0.1, "actor_policy": 0.98}, True, 0.0, "inference", "acting takes 49%"),
        (ACTING | {"reduce": 0.4, "actor_policy": 0.3}, True, 0.0, "waiting", "wait for each other 40%"),
    ],
)
def test_the_stage_that_limits_is_named(
    shares: dict[str, float], acting: bool, too_late: float, stage: str, words: str
) -> None:
    """Catches advice that would not help: more actors for a learner that is busy, a GPU for one that waits."""
    found = judge(shares, acting=acting, num_processes=2, too_late=too_late)
    assert found.stage == stage
    assert words in found.sentence


def test_the_watch_judges_the_last_seconds_and_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bottleneck over the whole run that does not change when the run does."""
    clock = [1000.0]
    monkeypatch.setattr(bottleneck.time, "monotonic", lambda: clock[0])
    statistics = RunStatistics(Ledger(dropped=Counter()))
    watch = BottleneckMonitor([statistics], acting=False, num_processes=1)
    assert watch.now() is watch.whole() is None

    def spend(seconds: int, **stages: float) -> None:
        for _ in range(seconds):
            clock[0] += 1
            for stage, share in stages.items():
                statistics.stage_seconds[stage] += share
            watch.now()

    spend(200, update=0.9, wait=0.1, actor_policy=0.5)
    spend(60, update=0.1, wait=0.9, actor_env=0.9)
    now, whole = watch.now(), watch.whole()
    assert now is not None
    assert whole is not None
    assert now.stage == "environment"
    assert "waits for them 90%" in now.sentence
    assert whole.stage == "inference"
    assert statistics.ledger.dropped == Counter()  # looking must not write


def test_policies_in_turn_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bottleneck of one policy's own time: the first of them waits for the batch of all, the others do not;
    and a run that hangs in another policy's update, which nothing is said of."""
    now = [1000.0]
    monkeypatch.setattr(bottleneck.time, "monotonic", lambda: now[0])
    clocks = [StageClock(), StageClock()]
    statistics = [RunStatistics(Ledger(), clock) for clock in clocks]
    watch = BottleneckMonitor(statistics, acting=False, num_processes=1)
    clocks[0].seconds |= {"wait": 1.5, "update": 2.5, "actor_env": 4.0}
    clocks[1].seconds |= {"update": 6.0, "actor_env": 3.0}
    alone, whole = BottleneckMonitor(statistics[:1], acting=False, num_processes=1).whole(), watch.whole()
    assert alone is not None
    assert whole is not None
    assert (alone.stage, whole.stage) == ("environment", "learner")
    assert "updates take 85% of the learner's time" in whole.sentence
    with clocks[1].mark("update"):
        for _ in range(80):
            now[0] += 1
            found = watch.now()
    assert found is not None
    assert "an update has been under way for 80 s" in found.sentence


@pytest.mark.parametrize(
    ("under_way", "acting", "num_learners", "stage", "words"),
    [
        ("wait", False, 1, "actors", "no batch has arrived for 40 s"),
        ("wait", True, 2, "actors", "acting has not made a batch for 40 s"),
        ("checkpoint", False, 1, "transfer", "checkpoint has been under way for 40 s"),
        ("update", False, 1, "learner", "an update has been under way for 40 s"),
        ("update", True, 3, "waiting", "an update of 3 learners has been under way for 40 s"),
        ("peers", False, 2, "waiting", "an update of 2 learners has been under way for 40 s"),
    ],
)
def test_a_stall_names_what_is_waited_for(
    under_way: str, acting: bool, num_learners: int, stage: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run without updates in which nothing is the bottleneck: a stage is counted only when it has ended."""
    now = [1000.0]
    monkeypatch.setattr(bottleneck.time, "monotonic", lambda: now[0])
    clock = StageClock()
    statistics = RunStatistics(Ledger(), clock)
    watch = BottleneckMonitor([statistics], acting=acting, num_processes=1, num_learners=num_learners)
    clock.seconds["update"] += 1.0
    with clock.mark(under_way):
        for _ in range(40):
            now[0] += 1
            watch.now()
        found = watch.now()
        assert found is not None
        assert (found.stage, words in found.sentence) == (stage, True)
        assert found.stage in STAGES
    assert watch.now() is None
    clock.seconds["update"] += 1.0
    found = watch.now()
    assert found is not None
    assert found.stage != "actors"
    # Updates that are as far apart as this are no stall.
    statistics.longest_wait = 60.0
    with clock.mark(under_way):
        found = []
        for _ in range(200):
            now[0] += 1
            found.append(watch.now())
        assert found[100:170] == [None] * 70
        assert found[-1] is not None
