"""The queue: books that balance to the step after every event, and data that is never older than promised."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rollouts import RUN, SMALL, random_columns
from shoal.learner.ledger import Ledger
from shoal.learner.rollout_driver import RolloutDriver
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import TrajectoryHeader, count_valid, to_bytes

SLOTS = 2
COLUMNS = [random_columns(SMALL, SLOTS, seed) for seed in range(5)]
STEPS = [count_valid(columns) for columns in COLUMNS]


def make_trajectory_queue(*, max_policy_lag, batch_size=4, num_actors=2):
    return TrajectoryQueue(
        SMALL,
        run_id=RUN,
        num_actors=num_actors,
        num_envs=SLOTS,
        batch_size=batch_size,
        max_policy_lag=max_policy_lag,
        ledger=Ledger(),
        clock=lambda: 0.0,
    )


def unroll(actor, sequence, policy_version, *, which=0, restart_index=0, run_id=RUN, num_slots=SLOTS):
    columns = {name: column[:num_slots] for name, column in COLUMNS[which].items()}
    header = TrajectoryHeader(
        run_id=run_id, actor=actor, restart_index=restart_index, sequence=sequence, policy_version=policy_version
    )
    return to_bytes(SMALL, header, columns)


def admit(trajectory_queue, actor):
    """The weights with which this actor may start; None where it may not."""
    found = trajectory_queue.admit([actor])
    if found is not None:
        assert found[0] == actor
        return found[1]
    return None


def take(trajectory_queue):
    """The next batch if there is one already."""
    stop = threading.Event()
    return trajectory_queue.next_batch(lambda _: stop.set(), stop)


class Books(RuleBasedStateMachine):
    """Every event that the trajectory queue can meet, in any order, against books kept by hand."""

    @initialize(max_policy_lag=st.integers(0, 3), batches=st.integers(1, 3), in_order=st.booleans())
    def start(self, max_policy_lag, batches, in_order):
        """Two actors; in lock step a batch is a whole number of unrolls of each."""
        self.lag, self.in_order = max_policy_lag, in_order
        self.size = 2 * batches if max_policy_lag == 0 else batches
        self.trajectory_queue = make_trajectory_queue(max_policy_lag=max_policy_lag, batch_size=self.size * SLOTS)
        self.version = -1
        self.under_way = []
        self.next_sequence = Counter()
        self.sent = []
        self.batch = None
        self.waiting = self.delivered = self.trained = self.non_finite = self.shut_down = 0
        self.publish(advance=True)

    def publish(self, advance):
        self.version += advance
        self.trajectory_queue.publish(self.version, f"weights {self.version}")

    @rule(actor=st.integers(0, 1))
    def admit(self, actor):
        """Weights are those of the newest version, and no unroll is admitted that would be trained too late."""
        if any(actor == other for other, _ in self.under_way):
            return
        weights = admit(self.trajectory_queue, actor)
        if weights is not None:
            assert weights == f"weights {self.version}"
            self.under_way.append((actor, self.version))

    def _next(self, choice):
        return self.under_way.pop(0 if self.in_order else choice % len(self.under_way))

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 9), which=st.integers(0, len(COLUMNS) - 1))
    def deliver(self, choice, which):
        """An ordinary delivery."""
        actor, version = self._next(choice)
        payload = unroll(actor, self.next_sequence[actor], version, which=which)
        self.next_sequence[actor] += 1
        self.sent.append(payload)
        self.trajectory_queue.deliver(actor, payload)
        self.delivered += STEPS[which]
        self.waiting += 1

    @precondition(lambda self: self.under_way and self.sent)
    @rule(choice=st.integers(0, 9))
    def duplicate(self, choice):
        """An unroll that was booked before comes in place of a new one."""
        actor, _ = self._next(choice)
        self._refused("duplicate", actor, self.sent[choice % len(self.sent)])

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 9), what=st.sampled_from(["junk", "stranger", "too few slots", "damaged"]))
    def malformed(self, choice, what):
        """No trajectory of this run."""
        actor, version = self._next(choice)
        payload = unroll(
            actor,
            self.next_sequence[actor],
            version,
            run_id="another" if what == "stranger" else RUN,
            num_slots=1 if what == "too few slots" else SLOTS,
        )
        if what == "junk":
            payload = np.zeros(100, np.uint8)
        elif what == "damaged":
            payload[-100] ^= 1
        self._refused("malformed", actor, payload)

    def _refused(self, reason, actor, payload):
        before = self.trajectory_queue.refused[reason]
        self.trajectory_queue.deliver(actor, payload)
        assert self.trajectory_queue.refused[reason] == before + 1

    @precondition(lambda self: self.under_way)
    @rule(choice=st.integers(0, 9))
    def abandon(self, choice):
        """The actor died."""
        actor, _ = self._next(choice)
        before = self.trajectory_queue.lost_unrolls
        self.trajectory_queue.abandon(actor)
        assert self.trajectory_queue.lost_unrolls == before + 1

    @precondition(lambda self: self.batch is None)
    @rule()
    def next_batch(self):
        """A batch as soon as there is enough that is fresh; what is stale is dropped, never trained."""
        stale = self.trajectory_queue.ledger.dropped["stale"]
        self.batch = take(self.trajectory_queue)
        if self.batch is None:
            return
        assert len(self.batch) == self.size
        for trajectory in self.batch:
            assert 0 <= self.version - trajectory.header.policy_version <= self.lag
        if self.in_order:
            assert self.trajectory_queue.ledger.dropped["stale"] == stale == 0
        if self.lag == 0:
            actors = [trajectory.header.actor for trajectory in self.batch]
            assert actors == sorted(actors)
            assert actors.count(0) == actors.count(1)

    @precondition(lambda self: self.batch is not None)
    @rule(finite=st.booleans())
    def update(self, finite):
        """The update ends, well or refused."""
        steps = sum(trajectory.env_steps for trajectory in self.batch)
        if finite:
            self.trained += steps
            self.trajectory_queue.book(self.batch, trained=steps)
        else:
            self.non_finite += steps
            self.trajectory_queue.book(self.batch, trained=0, dropped="non_finite")
        self.batch = None
        self.publish(advance=finite)

    @rule()
    def close(self):
        """Trajectories that wait are dropped as shutdown."""
        before = self.trajectory_queue.queued_bytes
        self.trajectory_queue.close()
        assert self.trajectory_queue.queued_bytes == self.trajectory_queue.queued_segments == 0
        assert (self.trajectory_queue.ledger.dropped["shutdown"] > self.shut_down) == (before > 0)
        self.shut_down = self.trajectory_queue.ledger.dropped["shutdown"]

    @invariant()
    def balanced(self):
        """To the step, against the books kept here."""
        if not hasattr(self, "trajectory_queue"):
            return
        ledger = self.trajectory_queue.ledger
        assert ledger.balance() == 0
        assert (ledger.sampled, ledger.trained) == (self.delivered, self.trained)
        assert ledger.dropped["non_finite"] == self.non_finite
        in_batch = sum(trajectory.env_steps for trajectory in self.batch or [])
        queued = [trajectory for _, trajectory in self.trajectory_queue._mailbox._waiting]
        assert ledger.in_flight == in_batch + sum(trajectory.env_steps for trajectory in queued)
        assert self.trajectory_queue.queued_bytes == sum(trajectory.num_bytes for trajectory in queued)
        assert set(ledger.dropped) <= {"stale", "non_finite", "shutdown"}


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=50)
test_books_balance_after_every_event = Books.TestCase


@pytest.mark.parametrize("max_policy_lag", [0, 1, 2, 5])
@pytest.mark.parametrize("slow_learner", [False, True])
def test_admission_keeps_data_fresh_and_wastes_nothing(max_policy_lag, slow_learner):
    """Actors that run ahead of a slow learner, so that data is thrown away; or that starve it though they may go on."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=max_policy_lag, batch_size=2 * SLOTS)
    under_way, sequence = [], Counter()
    lags = []

    def admit_idle():
        idle = [actor for actor in (0, 1) if actor not in dict(under_way)]
        admitted = [(actor, admit(trajectory_queue, actor)) for actor in idle]
        under_way.extend((actor, weights) for actor, weights in admitted if weights is not None)

    def deliver():
        actor, weights = under_way.pop(0)
        trajectory_queue.deliver(actor, unroll(actor, sequence[actor], weights))
        sequence[actor] += 1

    trajectory_queue.publish(0, 0)
    for version in range(30):
        admit_idle()
        while slow_learner and under_way:  # as much as is admitted while the learner is busy
            deliver()
            admit_idle()
        while (batch := take(trajectory_queue)) is None:
            assert under_way, "nothing is admitted and nothing can be trained: dead"
            deliver()
            admit_idle()
        admit_idle()
        lags += [version - trajectory.header.policy_version for trajectory in batch]
        trajectory_queue.book(batch, trained=sum(trajectory.env_steps for trajectory in batch))
        trajectory_queue.publish(version + 1, version + 1)
    # The promise is kept, and used: more would be stale, less would idle. Two actors are one batch ahead at most.
    assert max(lags) == (max_policy_lag if slow_learner else min(max_policy_lag, 1))
    assert not trajectory_queue.ledger.dropped["stale"]
    assert trajectory_queue.ledger.balance() == 0


def test_nothing_is_admitted_before_the_first_weights():
    """An actor that starts with weights nobody published."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=2)
    assert admit(trajectory_queue, 0) is None
    trajectory_queue.publish(0, "weights")
    assert admit(trajectory_queue, 0) == "weights"


def test_lock_step_gives_every_actor_its_share():
    """A fast actor that fills the batch alone: the update would depend on who was faster."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=0, batch_size=4 * SLOTS)
    trajectory_queue.publish(0, "weights")
    for sequence in (0, 1):
        assert admit(trajectory_queue, 0) is not None
        assert admit(trajectory_queue, 1) is not None
        for actor in (1, 0):
            trajectory_queue.deliver(actor, unroll(actor, sequence, 0))
    assert admit(trajectory_queue, 0) is None
    assert admit(trajectory_queue, 1) is None
    order = [(t.header.actor, t.header.sequence) for t in take(trajectory_queue)]
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert admit(trajectory_queue, 0) is None  # not while the update runs


@pytest.mark.parametrize("fault", ["malformed", "abandon"])
def test_lock_step_outlives_an_unroll_that_never_comes(fault):
    """A share that is used up by an unroll nobody will train: the update would wait for it for ever."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=0, batch_size=2 * SLOTS)
    trajectory_queue.publish(0, "weights")
    assert admit(trajectory_queue, 0)
    assert admit(trajectory_queue, 1)
    if fault == "malformed":
        trajectory_queue.deliver(0, np.zeros(100, np.uint8))
    else:
        trajectory_queue.abandon(0)
    trajectory_queue.deliver(1, unroll(1, 0, 0))
    assert admit(trajectory_queue, 1) is None
    assert admit(trajectory_queue, 0)
    assert admit(trajectory_queue, 0) is None
    trajectory_queue.deliver(0, unroll(0, 1, 0))
    assert [t.header.actor for t in take(trajectory_queue)] == [0, 1]


def test_stale_unrolls_are_dropped_and_counted():
    """An actor that answers after the others have moved on: its data is too old to train, and still in the books."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=1, batch_size=SLOTS)
    trajectory_queue.publish(0, 0)
    assert admit(trajectory_queue, 0) == 0
    trajectory_queue.publish(1, 1)
    trajectory_queue.publish(2, 2)
    trajectory_queue.deliver(0, unroll(0, 0, 0, which=1))
    assert take(trajectory_queue) is None
    assert trajectory_queue.ledger.dropped == {"stale": STEPS[1]}
    assert trajectory_queue.ledger.balance() == trajectory_queue.ledger.in_flight == trajectory_queue.queued_bytes == 0


def test_a_successor_starts_its_sequence_anew():
    """A replaced actor whose first unrolls are taken for its predecessor's."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=9, batch_size=SLOTS)
    trajectory_queue.publish(0, 0)
    for restart_index, sequence in [(0, 0), (0, 1), (1, 0), (1, 0), (0, 1)]:
        admit(trajectory_queue, 0)
        trajectory_queue.deliver(0, unroll(0, sequence, 0, restart_index=restart_index))
    assert trajectory_queue.queued_segments == 3 * SLOTS
    assert trajectory_queue.refused == {"duplicate": 2}


def test_a_failure_of_the_pool_reaches_who_waits():
    """A learner that waits for ever for a pool that is gone, or that learns nothing of the cause."""
    trajectory_queue = make_trajectory_queue(max_policy_lag=1)
    cause = OSError("the pool's own words")

    def pump(_):
        raise cause

    driver = RolloutDriver(pump, trajectory_queue)
    driver.start()
    with pytest.raises(RuntimeError, match="the pool's own words") as caught:
        trajectory_queue.next_batch(None, threading.Event())
    assert caught.value.__cause__ is cause
    driver.stop()
    assert not driver.is_alive()


def test_a_driver_that_never_started_stops():
    """A run that fails before it starts its driver, and then fails to end: no pool is closed, no summary written."""
    RolloutDriver(lambda _: None, make_trajectory_queue(max_policy_lag=1)).stop()


def test_stop_ends_the_wait():
    """Ctrl-C that takes effect only after the next batch."""
    trajectory_queue, stop = make_trajectory_queue(max_policy_lag=1), threading.Event()
    threading.Timer(0.05, stop.set).start()
    assert trajectory_queue.next_batch(None, stop) is None


def test_threads_share_it_without_losing_a_step():
    """A race between the driver's deliveries and the training loop's books."""
    trajectory_queue, sequence = make_trajectory_queue(max_policy_lag=2, batch_size=2 * SLOTS, num_actors=4), Counter()
    trajectory_queue.publish(0, 0)

    def pump(_):
        for actor in range(4):
            if (weights := admit(trajectory_queue, actor)) is not None:
                trajectory_queue.deliver(actor, unroll(actor, sequence[actor], weights, which=actor))
                sequence[actor] += 1

    driver = RolloutDriver(pump, trajectory_queue)
    driver.start()
    for version in range(40):
        batch = trajectory_queue.next_batch(None, threading.Event())
        assert all(version - t.header.policy_version <= 2 for t in batch)
        trajectory_queue.book(batch, trained=sum(t.env_steps for t in batch))
        trajectory_queue.publish(version + 1, version + 1)
    driver.stop()
    trajectory_queue.close()
    ledger = trajectory_queue.ledger
    assert ledger.balance() == ledger.in_flight == trajectory_queue.queued_bytes == 0
    assert ledger.sampled == sum(STEPS[actor] * count for actor, count in sequence.items())
