"""Learners that share an update, in processes of their own: equal to one learner, and never waiting for the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from rollouts import make_learner, random_batch, small_policy, state_of
from shoal.learner.group import LearnerGroup, LearnerLost, join_store, open_store, use_interface
from shoal.learner.learner import Learner, NonFiniteUpdate
from shoal.policy.weights import flatten_weights
from tensordict import TensorDict

CPU = torch.device("cpu")

SLOTS = 8
SCHEDULES = {
    "learning_rate": {"kind": "cosine", "end": 0.0, "over_env_steps": 1000},
    "clip_coef": {"kind": "linear", "end": 0.01, "over_env_steps": 800},
}


def _make(rank: int, size: int, settings: dict[str, Any], num_shards: int = 1) -> Learner:
    # Weights of its own: they must be those of the first learner all the same.
    core, settings = settings.get("core", "lstm"), {name: value for name, value in settings.items() if name != "core"}
    return make_learner(
        small_policy(seed=rank, core=core), num_shards=num_shards, first_shard=rank, batch_size=size * SLOTS, **settings
    )


def _member(rank: int, size: int, port: int, settings: dict[str, Any], connection: Connection) -> None:
    """One learner beside the first: an update with its part of every batch it is sent."""
    torch.set_num_threads(1)
    use_interface("127.0.0.1")
    learner = _make(rank, size, settings)
    group = LearnerGroup(
        join_store("127.0.0.1", port, 60), device=CPU, generation=0, rank=rank, size=size, timeout_seconds=60
    )
    learner.synchronize(group)
    while (seed := connection.recv()) is not None:
        connection.send(_update(learner, _part(seed, rank, learner)))
    group.close()


def _part(seed: int, rank: int, learner: Learner) -> TensorDict:
    batch = random_batch(100 * seed + rank, num_slots=SLOTS, state_shapes=state_of(learner.policy))
    if seed == 13 and rank == 1:
        batch["reward"][0, 0] = float("inf")
    return batch


def _update(learner: Learner, batch: Any) -> tuple[str, Any]:
    try:
        result = learner.update(batch)
    except (NonFiniteUpdate, LearnerLost) as error:
        return flatten_weights(learner.policy, 0).sha256, type(error).__name__
    return flatten_weights(learner.policy, 0).sha256, (result.env_steps, result.all_env_steps, result.terms)


class Group:
    """This process as rank 0, and the others."""

    def __init__(self, size: int, **settings: Any) -> None:
        use_interface("127.0.0.1")
        self.size, self.settings = size, settings
        self.store = open_store("127.0.0.1", 60)
        self.processes, self.connections = [], []
        context = mp.get_context("spawn")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, size, self.store.port, settings, theirs))
            process.start()
            self.processes.append(process)
            self.connections.append(ours)
        self.learner = _make(0, size, settings)
        self.out_of_reach = threading.Event()
        self.group = LearnerGroup(
            self.store,
            device=CPU,
            generation=0,
            rank=0,
            size=size,
            timeout_seconds=60,
            out_of_reach=self.out_of_reach,
        )
        self.learner.synchronize(self.group)

    def update(self, seed: int) -> list[tuple[str, Any]]:
        """The result of one update, from every learner."""
        for connection in self.connections:
            connection.send(seed)
        own = _update(self.learner, _part(seed, 0, self.learner))
        return [own, *(connection.recv() for connection in self.connections)]

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # one that was killed
                connection.send(None)
        self.group.close()
        for process in self.processes:
            process.join(20)
            assert not process.is_alive()


def _one_learner(size: int, seeds: list[int], settings: dict[str, Any]) -> Learner:
    """The same updates by one learner with everybody's segments."""
    learner = _make(0, size, settings, num_shards=size)
    for seed in seeds:
        learner.update(torch.cat([_part(seed, rank, learner).clone() for rank in range(size)]))
    return learner


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {}),
        (2, {"epochs": 2, "minibatches": 4}),
        (3, {"minibatches": 2}),
        (2, {"epochs": 4, "target_kl": 1e-4, "schedules": SCHEDULES}),
        (2, {"epochs": 2, "minibatches": 4, "value_coef": "auto"}),
        (2, {"epochs": 2, "minibatches": 4, "core": "gru"}),
        (2, {"epochs": 2, "minibatches": 4, "core": "linear"}),
    ],
)
def test_learners_that_share_an_update_equal_one(size: int, settings: dict[str, Any]) -> None:
    """A gradient that is averaged over learners instead of segments, advantages normalized by each for itself, a
    minibatch that is drawn differently, a replica that drifts."""
    seeds = [1, 2, 3]
    group = Group(size, learning_rate=1e-2, **settings)
    try:
        for seed in seeds:
            told = group.update(seed)
            assert len({sha256 for sha256, _ in told}) == 1
            own, total, terms = told[0][1]
            assert total == sum(result[0] for _, result in told)
            assert own < total
            assert all(result[2] == terms for _, result in told)
        alone = _one_learner(size, seeds, {"learning_rate": 1e-2, **settings})
        # Shards are added in the order of their learners in either case: not even the rounding differs.
        assert told[0][0] == flatten_weights(alone.policy, 0).sha256
    finally:
        group.close()


def test_a_number_that_is_not_finite_anywhere_is_refused_everywhere() -> None:
    """A learner that refuses what the others step on: they would be different from then on, or wait for ever."""
    group = Group(2, minibatches=2)
    try:
        [(before, _), _] = group.update(1)
        told = group.update(13)
        assert [error for _, error in told] == ["NonFiniteUpdate"] * 2
        assert {sha256 for sha256, _ in told} == {before}
        assert all(isinstance(result, tuple) for _, result in group.update(2))
    finally:
        group.close()


@pytest.mark.parametrize("minibatches", [1, 4])
def test_a_dead_learner_is_noticed_at_once_and_nothing_changes(minibatches: int) -> None:
    """A learner that waits for a dead one, and an update of which a part was made."""
    group = Group(2, minibatches=minibatches)
    try:
        [(before, _), _] = group.update(1)
        process_id = group.processes[0].pid
        assert process_id
        os.kill(process_id, signal.SIGKILL)
        start = time.monotonic()
        sha256, error = _update(group.learner, _part(2, 0, group.learner))
        assert error == "LearnerLost"
        assert sha256 == before
        assert time.monotonic() - start < 30  # its time limit is 60
    finally:
        group.close()


@pytest.mark.parametrize(("size", "settings"), [(2, {}), (3, {}), (2, {"epochs": 2, "minibatches": 2})])
def test_a_learner_that_says_nothing_is_not_waited_for_where_nobody_can_be_reached(
    size: int, settings: dict[str, Any]
) -> None:
    """A run whose cluster is gone, and which waits for a machine that went away without a word until it is ended,
    unsaved; a process that can make no other group after it."""
    group = Group(size, **settings)
    try:
        [(before, _), *_] = group.update(1)
        for process in group.processes:
            os.kill(process.pid, signal.SIGSTOP)  # type: ignore[arg-type]
        threading.Timer(1.0, group.out_of_reach.set).start()
        with pytest.raises(LearnerLost, match="nobody can be reached"):
            group.learner.update(_part(2, 0, group.learner))
        assert flatten_weights(group.learner.policy, 0).sha256 == before
        group.group.close()
        alone = LearnerGroup(open_store("127.0.0.1", 60), device=CPU, generation=1, rank=0, size=1, timeout_seconds=60)
        group.learner.synchronize(alone)
        group.learner.update(_part(2, 0, group.learner))
        alone.close()
    finally:
        for process in group.processes:
            process.kill()
        group.close()
