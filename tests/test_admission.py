"""Admission in simulated time: who starts next, and whether its unroll is in time. Only durations are made up."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from fuzz import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shoal.learner.admission import Admission
from simulated_actors import Simulation, fair_shares


def simulate(durations, *, update, per_batch, max_policy_lag, seconds):
    simulation = Simulation(
        num_actors=len(durations),
        duration=lambda actor, _: durations[actor],
        update=lambda _: update,
        per_batch=per_batch,
        max_policy_lag=max_policy_lag,
    )
    return simulation, simulation.run(seconds)


def test_the_data_of_a_run_comes_from_all_its_actors():
    """Low seats that win every admission: 100, 99, 99, 99 unrolls and then none, where the learner is the slow one."""
    _, outcome = simulate([1.0] * 16, update=2.0, per_batch=4, max_policy_lag=2, seconds=200)
    assert min(outcome.trained.values()) >= 0.95 * max(outcome.trained.values())
    assert len(outcome.trained) == 16
    assert not outcome.stale
    assert outcome.idle_seconds <= 1.0  # until the first batch


@pytest.mark.parametrize(
    ("factor", "max_policy_lag", "trained"),
    [pytest.param(10.0, 2, 17, id="10 times, lag 2"), pytest.param(4.0, 1, 47, id="4 times, lag 1")],
)
def test_the_work_of_a_slow_actor_is_not_thrown_away(factor, max_policy_lag, trained, caplog):
    """19 of 20 unrolls stale, or 49 of 50, because the others overtake; and nobody says so."""
    durations = [1.0] * 7 + [factor]
    _, outcome = simulate(durations, update=0.1, per_batch=8, max_policy_lag=max_policy_lag, seconds=200)
    assert len(outcome.stale) <= 1  # the first one: nobody knew its duration
    assert outcome.trained[7] >= trained
    assert min(outcome.trained[actor] for actor in range(7)) >= 190
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith(f"actor 7 is too slow for actor.max_policy_lag={max_policy_lag}")


@pytest.mark.parametrize(("short", "long", "period"), [(1.5, 8.0, 2), (1.0, 4.0, 4), (8.0, 1.5, 4)])
def test_the_long_unrolls_of_an_actor_that_varies_are_trained(short, long, period, caplog):
    """Every long unroll stale because the actor's short ones are in time: what is trained is only what was quick; and
    lags above the setting that nobody speaks of."""
    made = itertools.count()

    def duration(actor, _):
        return 1.0 if actor != 7 else (short if next(made) % period == 0 else long)

    simulation = Simulation(num_actors=8, duration=duration, update=lambda _: 0.1, per_batch=8, max_policy_lag=2)
    outcome = simulation.run(200)
    assert [unroll.actor for unroll in outcome.stale] in ([], [7])  # the first long one: nobody knew of such
    assert min(outcome.trained[actor] for actor in range(7)) >= 190
    assert outcome.trained[7] >= 200 / (short + long * (period - 1)) * period / 2
    said = [record.getMessage() for record in caplog.records if "at times too slow" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("actor 7 is at times too slow for actor.max_policy_lag=2: an unroll took ")


def test_an_actor_that_is_fast_again_is_in_time_again(caplog):
    """A lag without a bound for ever, because a machine was busy for a minute."""
    simulation = Simulation(
        num_actors=8,
        duration=lambda actor, now: 10.0 if actor == 7 and now < 60 else 1.0,
        update=lambda _: 0.1,
        per_batch=8,
        max_policy_lag=2,
    )
    simulation.run(150)
    assert max(simulation.outcome.lags) > 2
    assert max(simulation.outcome.lags[-200:]) <= 2
    assert not simulation.queue._admission._too_slow
    assert len(caplog.records) == 1


def test_nobody_waits_behind_an_actor_that_is_gone():
    """A dead actor at the head of the queue for whom everybody waits."""
    simulation = Simulation(num_actors=2, duration=lambda *_: 1.0, update=lambda _: 0.1, per_batch=1, max_policy_lag=1)
    queue = simulation.queue
    queue.publish(0, "weights")
    assert queue.admit([0, 1]) == (0, "weights")
    assert queue.admit([1]) == (1, "weights")
    queue.abandon(0)
    assert queue.admit([0]) == (0, "weights")
    assert queue.admit([]) is None


DURATIONS = st.floats(1.0, 6.0)


@given(
    durations=st.lists(DURATIONS, min_size=1, max_size=8),
    update=st.floats(0.01, 3.0),
    per_batch=st.integers(1, 6),
    max_policy_lag=st.integers(1, 4),
    slows_down=st.one_of(st.none(), st.floats(1.5, 10.0)),
    varies=st.lists(st.floats(1.0, 8.0), max_size=3),
)
@example(durations=[1.0, 2.0, 1.75], update=1.0, per_batch=3, max_policy_lag=1, slows_down=None, varies=[])
@example(durations=[1.25, 2.5, 1.75, 2.0], update=0.5, per_batch=1, max_policy_lag=4, slows_down=None, varies=[])
@example(durations=[1.0, 3.0, 4.0, 4.0, 1.25], update=1.0, per_batch=4, max_policy_lag=2, slows_down=None, varies=[])
@example(durations=[2.0, 1.0, 1.0], update=1.0, per_batch=2, max_policy_lag=2, slows_down=None, varies=[1.0, 3.0])
@settings(max_examples=examples(15), deadline=None)
def test_everybody_has_its_share_in_time(durations, update, per_batch, max_policy_lag, slows_down, varies):
    """A share below half of the fair one; an unroll that is made to be thrown away; a learner that waits for nothing.

    Durations are constant, except that actor 0 may slow down for good after a third of the time, and its unrolls may
    take turns in being longer.
    """
    seconds = 12 * max(*durations, update)
    made = itertools.count()

    def shortest(actor, now):
        slower = slows_down if slows_down and actor == 0 and now > seconds / 3 else 1.0
        return slower * durations[actor]

    def duration(actor, now):
        longer = [1.0, *varies][next(made) % (len(varies) + 1)] if actor == 0 else 1.0
        return longer * shortest(actor, now)

    def check(simulation):
        """The learner is not idle while somebody could start: one that nobody overtakes and that has a place."""
        if simulation.updating or simulation.ahead // per_batch > max_policy_lag:
            return
        for actor in simulation.idle():
            assert shortest(actor, simulation.now) > min(durations)

    simulation = Simulation(
        num_actors=len(durations),
        duration=duration,
        update=lambda _: update,
        per_batch=per_batch,
        max_policy_lag=max_policy_lag,
    )
    outcome = simulation.run(seconds, check)
    # Its actor took longer than what was measured, or somebody had not been measured yet when it began; or somebody
    # else took less than usual.
    known = max(simulation.measured_since.get(actor, seconds) for actor in range(len(durations)))
    for unroll in outcome.stale:
        if varies and unroll.actor != 0:
            continue
        assert unroll.seconds > unroll.measured * (1 + 1e-9) or unroll.begun_at <= known, unroll
    if slows_down is None and not varies:
        most = [seconds / one for one in durations]
        for actor, share in enumerate(fair_shares(outcome.trained.total(), most)):
            # One was the first, one is under way, one waits.
            assert outcome.trained[actor] >= share / 2 - 3, (actor, outcome.trained, share)


def test_admissions_go_on_where_they_were() -> None:
    """Catches a resumed run in which it is another actor's turn, or that forgets who had its turn already."""

    def make(max_policy_lag: int) -> Admission:
        return Admission(num_actors=3, num_envs=2, batch_size=6, max_policy_lag=max_policy_lag, clock=lambda: 0.0)

    for lag, expected in ((2, 1), (0, 1)):
        before, after = make(lag), make(lag)
        before.published(4)
        assert before.admit([0, 1, 2], 4, 0) == 0
        assert before.came_back(0) is not None
        after.set_state(json.loads(json.dumps(before.get_state())))
        # The weights are published again when the run begins, which is no new version.
        after.published(4)
        for one in (before, after):
            assert one.admit([0, 1, 2], 4, 1) == expected
            unroll = one.came_back(expected)
            assert unroll is not None
            assert unroll.serial == 1
        if lag == 0:
            assert after.admit([0], 4, 1) is None
            after.published(5)
            assert after.admit([0], 5, 0) == 0
    with pytest.raises((ValueError, KeyError)):
        make(0).set_state({**before.get_state(), "waiting": ["0"]})
