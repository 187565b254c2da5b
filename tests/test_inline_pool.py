"""The pool in this process: a worker that fails is replaced, also where the first replacement cannot be made."""

from __future__ import annotations

import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from service import make_setup, make_spec
from shoal.actors import pool as pool_module
from shoal.actors.pool import InlinePool
from shoal.learner.ledger import Ledger
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.weights import flatten_weights

UNBUILDABLE = "no display"


class Flaky(gymnasium.Env):
    """Cannot be made while ``Flaky.unbuildable`` is above 0, which it lowers."""

    unbuildable = 0
    observation_space = spaces.Box(0, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        if Flaky.unbuildable:
            Flaky.unbuildable -= 1
            raise RuntimeError(UNBUILDABLE)

    def reset(self, *, seed=None, options=None):
        """Nothing."""
        return np.zeros(2, np.float32), {}

    def step(self, action):
        """Every step ends an episode."""
        return np.zeros(2, np.float32), 0.0, True, False, {}


gymnasium.register("Flaky-v0", Flaky)


@pytest.fixture
def pool(monkeypatch):
    """Two workers of one slot, of which five failures in a row are allowed; and their queue."""
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_SECONDS", 0.01)
    Flaky.unbuildable = 0
    setup = make_setup("Flaky-v0", num_envs=1, unroll_length=2)
    queue = TrajectoryQueue(
        make_spec(setup),
        run_id=setup.run_id,
        num_actors=2,
        num_envs=1,
        batch_size=2,
        max_policy_lag=0,
        ledger=Ledger(),
    )
    pool = InlinePool(setup, range(2), queue, max_consecutive_failures=5)
    queue.publish(0, flatten_weights(setup.make_policy(), 0))
    yield pool, queue
    pool.close()


def break_first(pool, monkeypatch):
    """The next unroll of actor 0 fails, whatever its environment does."""
    worker = pool._workers[0]
    monkeypatch.setattr(worker, "rollout", lambda _: (_ for _ in ()).throw(SystemError("the game crashed")))


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_replacement_that_cannot_be_made_at_once_is_tried_again(pool, monkeypatch, failures):
    """A recovery outside its own rule for trying again: one failure of it ends a run that allows five."""
    pool, queue = pool
    break_first(pool, monkeypatch)
    Flaky.unbuildable = failures
    batch = queue.next_batch(pool.pump, threading.Event())
    assert [trajectory.header.actor for trajectory in batch] == [0, 1]
    assert batch[0].header.restart_index == 1 + failures
    assert pool.restarts["error"] == 1 + failures == len(pool.replaced)
    assert (pool.num_alive, pool.states["pausing"], pool.recoveries.count) == (2, 0, 1)
    assert queue.lost_unrolls == 1


def test_the_others_act_meanwhile_and_it_ends_in_the_end(pool, monkeypatch):
    """An actor that is never back and keeps all the others waiting, or a run that tries for ever."""
    pool, queue = pool
    break_first(pool, monkeypatch)
    Flaky.unbuildable = 1000
    pool.pump(0.01)
    assert (pool.num_alive, pool.states["pausing"]) == (1, 1)
    assert queue.queued_segments == 1
    threading.Timer(60, (stop := threading.Event()).set).start()
    with pytest.raises(RuntimeError, match=UNBUILDABLE):
        queue.next_batch(pool.pump, stop)
    assert Flaky.unbuildable == 1000 - 4
