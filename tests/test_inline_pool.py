"""The pool in this process: a worker that fails is replaced, also where the first replacement cannot be made."""

from __future__ import annotations

import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from service import make_setup, make_spec
from shoal.actors import pool as pool_module
from shoal.actors.pool import MOST_REFUSED, InlinePool, RefusedDeliveries
from shoal.envs.boundary import EnvironmentFault
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


def replay(payload, worker):
    """An actor whose sequence does not move on."""
    return payload


def damage(payload, worker):
    """A bit of the data is flipped."""
    worse = payload.copy()
    worse[len(worse) // 2] ^= 1
    return worse


def poison(payload, worker):
    """A memory that is NaN, as after an observation without bounds."""
    worker._columns["initial_h"][:] = np.nan
    return worker._ship({"policy_seconds": 0.0, "env_seconds": 0.0})


def deliver_changed(pool, monkeypatch, change):
    """The present worker of actor 0 delivers what ``change`` makes of its first unroll, for ever."""
    worker = pool._workers[0]
    rollout, sent = worker.rollout, []

    def refused(weights):
        if not sent:
            sent.append(rollout(weights))
        return change(sent[0], worker)

    monkeypatch.setattr(worker, "rollout", refused)


@pytest.mark.parametrize("change", [replay, damage, poison])
def test_an_actor_whose_deliveries_are_refused_is_replaced(pool, monkeypatch, change):
    """A refusal without a bound: an actor that delivers poison for ever, alone a run that waits for ever."""
    pool, queue = pool
    deliver_changed(pool, monkeypatch, change)
    first = queue.next_batch(pool.pump, threading.Event())
    queue.book(first, trained=sum(trajectory.env_steps for trajectory in first))
    queue.publish(1, flatten_weights(pool._setup.make_policy(), 1))
    batch = queue.next_batch(pool.pump, threading.Event())
    assert [trajectory.header.actor for trajectory in batch] == [0, 1]
    assert batch[0].header.restart_index == 1
    assert pool.restarts == {"refused": 1}
    assert "3 deliveries in a row were refused; the last one: " in pool.replaced[0][1]
    assert queue.refused.total() == MOST_REFUSED
    assert (queue.lost_unrolls, queue.ledger.balance()) == (0, 0)


def test_one_refusal_in_between_replaces_nobody(pool, monkeypatch):
    """Refusals that are counted over a whole run: in the end every actor of a long one is replaced."""
    pool, queue = pool
    for version in range(1, 2 * MOST_REFUSED):
        with monkeypatch.context() as context:
            deliver_changed(pool, context, damage)
            pool.pump(0.01)
        batch = queue.next_batch(pool.pump, threading.Event())
        queue.book(batch, trained=sum(trajectory.env_steps for trajectory in batch))
        queue.publish(version, flatten_weights(pool._setup.make_policy(), version))
    assert queue.refused.total() >= MOST_REFUSED
    assert pool.restarts == {}


def test_successors_whose_deliveries_are_refused_end_the_run(pool, monkeypatch):
    """A refused delivery that counts as a success: replaced without end, where five failures in a row are allowed."""
    pool, queue = pool
    deliver = queue.deliver
    monkeypatch.setattr(queue, "deliver", lambda actor, payload: deliver(actor, damage(payload, None)))
    threading.Timer(60, (stop := threading.Event()).set).start()
    with pytest.raises(RefusedDeliveries, match="refused"):
        queue.next_batch(pool.pump, stop)
    assert pool.restarts["refused"] >= 4


def fails(*_):
    """What an environment raises that is given up, or whose process died."""
    raise EnvironmentFault("slot 0: given up")


def test_a_worker_that_does_not_say_its_state_costs_its_own(pool, monkeypatch):
    """A checkpoint that is not written, with all that was trained, because an environment cannot be continued."""
    pool, queue = pool
    queue.next_batch(pool.pump, threading.Event())
    queue.publish(1, flatten_weights(pool._setup.make_policy(), 1))
    monkeypatch.setattr(pool._workers[0], "get_state", fails)
    assert list(pool.get_state()) == ["1"]
    assert not pool.restarts
    batch = queue.next_batch(pool.pump, threading.Event())
    assert [trajectory.header.restart_index for trajectory in batch] == [1, 0]
    assert pool.restarts["error"] == 1


def test_a_worker_that_fails_as_it_goes_on_is_replaced(pool, monkeypatch):
    """A resume that ends with an environment's error, of which the run allows five."""
    pool, queue = pool
    monkeypatch.setattr(pool._workers[0], "set_state", fails)
    state = pool.get_state()
    begun = pool.set_state(state)
    assert begun == {(0, 0): "EnvironmentFault: slot 0: given up"}
    batch = queue.next_batch(pool.pump, threading.Event())
    assert [trajectory.header.restart_index for trajectory in batch] == [1, 0]
    assert pool.restarts["error"] == 1


def test_an_actor_that_always_fails_as_it_goes_on_ends_the_run(pool, monkeypatch):
    """Failures at a resume that are not counted, so that the run tries for ever."""
    pool, _ = pool
    monkeypatch.setattr(pool, "_max_failures", 1)
    monkeypatch.setattr(pool._workers[0], "set_state", fails)
    with pytest.raises(EnvironmentFault, match="given up"):
        pool.set_state(pool.get_state())
