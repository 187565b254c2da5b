"""The states of actors that start, wait, work and fail: real Ray actors, and the numbers that metrics read."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from service import make_setup, make_spec, wait_for
from shoal.actors.config import ActorConfig
from shoal.actors.ray_pool import RayPool
from shoal.deploy.training.worker_group import WorkerGroup
from shoal.learner.ledger import Ledger
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.weights import Weights, flatten_weights


@pytest.fixture
def fed(ray_session: None) -> Iterator[tuple[RayPool, TrajectoryQueue]]:
    """Two actors, of which only one has a place, and their trajectory queue."""
    setup = make_setup("recall", num_envs=8, unroll_length=8)
    trajectory_queue = TrajectoryQueue(
        make_spec(setup),
        run_id=setup.run_id,
        num_actors=2,
        num_envs=8,
        batch_size=8,
        max_policy_lag=1,
        ledger=Ledger(),
    )
    trajectory_queue.publish(0, flatten_weights(setup.make_policy(), 0))
    pool = RayPool(setup, range(2), ActorConfig(), trajectory_queue, {"num_cpus": 3})
    yield pool, trajectory_queue
    pool.close()


def test_actors_are_known_by_state(fed: tuple[RayPool, TrajectoryQueue]) -> None:
    """Catches an actor that waits for a place for ever and is called alive, one that failed and is in no number."""
    pool, _ = fed
    worker_group = WorkerGroup(pool, learners=None)
    seen: set[str] = set()

    def state(name: str) -> int:
        pool.pump(0.05)
        states = worker_group.states
        assert sum(states.values()) == 2
        assert list(states) == ["up", "starting", "unplaced", "pausing"]
        assert states["up"] == worker_group.num_alive
        seen.update(name for name, count in states.items() if count)
        return states[name]

    assert worker_group.states["unplaced"] == 2
    wait_for(lambda: state("up"))
    assert pool.states == Counter(up=1, unplaced=1)
    [process] = pool.process_ids()
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: state("pausing"))
    # Whoever takes the place that is free now.
    wait_for(lambda: state("up"))
    assert seen == {"up", "starting", "unplaced", "pausing"}


def test_a_straggler_is_seen_while_it_is_late(fed: tuple[RayPool, TrajectoryQueue]) -> None:
    """Catches an actor whose unrolls are dropped, one after the other, and that nobody can tell from the others."""
    pool, trajectory_queue = fed
    weights, never = trajectory_queue._weights.newest, threading.Event()

    def pumped() -> None:
        pool.pump(0.05)

    def publish(*versions: int) -> None:
        for version in versions:
            trajectory_queue.publish(version, Weights(version, weights.flat, weights.content_hash))

    wait_for(lambda: pumped() or trajectory_queue.queued_segments == 16)
    assert trajectory_queue.lags() == []
    [process] = pool.process_ids()
    os.kill(process, signal.SIGSTOP)
    try:
        for version in (1, 2):
            batch = trajectory_queue.next_batch(None, never)
            trajectory_queue.book(batch, trained=sum(trajectory.env_steps for trajectory in batch))
            publish(version)
        pumped()
        assert trajectory_queue.lags() == [0]
        publish(3, 4, 5)
        assert trajectory_queue.lags() == [3]
    finally:
        os.kill(process, signal.SIGCONT)
    wait_for(lambda: pumped() or trajectory_queue.queued_segments)
    assert trajectory_queue.lags() in ([], [0])
    # What was said came true.
    stop = threading.Event()
    trajectory_queue.next_batch(lambda _: stop.set(), stop)
    assert trajectory_queue.ledger.dropped["stale"] > 0
