"""The boundary contract, checked on every adapter by one checker that knows none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from boundary_contract import (
    NUM_STEPS,
    Rollout,
    check_every_row_is_written,
    check_seeds,
    check_void_after_ends,
    check_void_rows,
)
from make_env import env_spec, make_env
from shoal.envs.boundary import ContinuousActions, DiscreteActions, VectorEnvironment
from shoal.envs.registry import make_vector_env

Make = Callable[..., VectorEnvironment]

ADAPTERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mettagrid/forage": ("mettagrid/forage", 16, {}),
    "mettagrid/corridor": ("mettagrid/corridor", 8, {"stagger": False}),
    "recall": ("recall", 6, {}),
    "recall-no-delay": ("recall?delay=0&num_cues=2", 3, {}),
    "CartPole": ("CartPole-v1", 3, {}),
    "Pendulum": ("Pendulum-v1", 2, {}),
    "CartPole-same-step": ("CartPole-v1", 3, {"autoreset_mode": "same_step"}),
    "CartPole-disabled": ("CartPole-v1", 3, {"autoreset_mode": "disabled"}),
    "CartPole-async": ("CartPole-v1", 2, {"vectorization": "async"}),
    "CartPole-native": ("CartPole-v1", 3, {"vectorization": "native"}),
    "pettingzoo": (
        "pettingzoo:scripted_games:parallel_env",
        4,
        {"num_agents": 2, "salt": None, "together": True},
    ),
}


def skip_without_package(env_id: str) -> None:
    for package in ("mettagrid", "pettingzoo"):
        if env_id.startswith(package) and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs shoal[{package}]")


@pytest.fixture(scope="module", params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> tuple[str, int, dict[str, Any]]:
    skip_without_package(request.param)
    return ADAPTERS[request.param]


@pytest.fixture(scope="module")
def rollout(adapter: tuple[str, int, dict[str, Any]]) -> Rollout:
    env_id, slots, kwargs = adapter
    env = make_env(env_id, slots, 7, **kwargs)
    assert isinstance(env, VectorEnvironment)
    assert env.num_envs == slots
    try:
        result = Rollout(env, NUM_STEPS)
        assert env.faults == []
        return result
    finally:
        env.close()


def test_call_after_an_end_is_void_and_no_other_is(rollout: Rollout) -> None:
    """Catches an is_first that comes early, late or not at all: states leak across episodes or are lost."""
    check_void_after_ends(rollout)


def test_final_observations_are_written_where_episodes_end(rollout: Rollout) -> None:
    """Catches final observations that are left out, are the next episode's first, or go to slots that play on."""
    if rollout.final_obs is None:
        return
    written = (rollout.final_obs != 77).reshape(*rollout.reward.shape, -1).any(2)
    np.testing.assert_array_equal(written, rollout.terminated | rollout.truncated)
    assert (rollout.final_obs != rollout.obs[:, 1:])[written].any(1).all()


def test_void_transition_pays_nothing_and_ends_nothing(rollout: Rollout) -> None:
    """Catches stale rewards and flags of the last episode that are counted twice."""
    check_void_rows(rollout)


def test_every_row_is_written(rollout: Rollout) -> None:
    """Catches rows left as they were allocated, e.g. because a strided view was copied first."""
    check_every_row_is_written(rollout)


def test_same_seed_same_data(adapter: tuple[str, int, dict[str, Any]], rollout: Rollout) -> None:
    """Catches randomness outside of the seed: a run that cannot be resumed exactly."""
    check_seeds(adapter, rollout)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "limit", "agents"),
    [
        ("mettagrid/forage", {"stagger": False}, 200, 8),
        ("mettagrid/corridor", {"stagger": False}, 200, 4),
        ("Pendulum-v1", {}, 200, 1),
    ],
)
def test_time_limit_truncates(env_id: str, kwargs: dict[str, Any], limit: int, agents: int) -> None:
    """Catches a time limit reported as termination: the learner would take the future's value for zero."""
    skip_without_package(env_id)
    env = make_env(env_id, 2 * agents, 3, **kwargs)
    rollout = Rollout(env, limit + 1)
    env.close()
    assert not rollout.terminated.any()
    assert rollout.truncated[:, limit - 1].all()
    assert rollout.truncated.sum() == 2 * agents
    assert rollout.is_first[:, limit + 1].all()


@pytest.mark.parametrize("env_id", ["mettagrid/forage", "recall", "CartPole-v1"])
def test_slots_differ(env_id: str) -> None:
    """Catches slots seeded alike: the batch would hold the same episode many times."""
    skip_without_package(env_id)
    agents = 8 if env_id.startswith("mettagrid") else 1
    slots = 8 * agents
    env = make_vector_env(env_id, slots, 0)
    rollout = Rollout(env, 20)
    env.close()
    first = rollout.obs[::agents, 1:].reshape(8, -1)
    assert len(np.unique(first, axis=0)) == 8


def test_workers_differ_whose_seeds_are_spawned() -> None:
    """Catches seeding by seed + index: neighbouring workers would share episodes."""
    firsts = []
    for sequence in np.random.SeedSequence(0).spawn(2):
        env = make_vector_env("CartPole-v1", 4, sequence)
        obs = np.zeros((4, 4), dtype=np.float32)
        env.reset(obs)
        env.close()
        firsts += [obs]
    assert len(np.unique(np.concatenate(firsts), axis=0)) == 8


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_spec_is_consistent(name: str) -> None:
    """Catches specs from which no network can be built."""
    skip_without_package(name)
    spec = env_spec(ADAPTERS[name][0], **ADAPTERS[name][2])
    assert all(size > 0 for size in spec.obs_shape)
    if isinstance(spec.actions, DiscreteActions):
        assert all(len(set(names)) == len(names) > 1 for names in spec.actions.names)
    else:
        assert isinstance(spec.actions, ContinuousActions)
        assert len(spec.actions.names) == len(spec.actions.low) == len(spec.actions.high)
