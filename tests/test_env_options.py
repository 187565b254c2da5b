"""Options of episodes: a curriculum reaches the environments of every kind, and only episodes that begin afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from make_env import make_env
from rollouts import make_policy
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.envs.boundary import EnvironmentFault
from shoal.envs.config import AdapterOptions
from shoal.envs.play import play
from shoal.envs.registry import make_vector_env
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights

KINDS: list[dict[str, Any]] = [
    {"vectorization": "sync"},
    {"vectorization": "sync", "autoreset_mode": "same_step"},
    {"vectorization": "async"},
    {"vectorization": "async", "autoreset_mode": "disabled", "slot_groups": 1},
    {"vectorization": "native"},
]


def worker_of(env_id: str, num_envs: int = 2, **kwargs: Any) -> RolloutWorker:
    env = make_env(env_id, num_envs, 0, **kwargs)
    policy = make_policy(observation_of(env.spec), actions_of(env.spec))
    return RolloutWorker(env, policy, 6, run_id="options", actor=0, restart_index=0, seed=0)


def levels(worker: RolloutWorker, version: int, options: dict[str, Any] | None) -> list[list[float]]:
    """The levels that one unroll showed to each slot at its rows."""
    weights = dataclasses.replace(flatten_weights(worker.policy, version), env_options=options)
    columns = from_bytes(worker.spec, worker.rollout(weights)).columns
    return [[float(value) for value in row] for row in np.asarray(columns["obs"])[:, :, 0]]


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_episodes_that_begin_later_get_the_options(kwargs: dict[str, Any]) -> None:
    """Catches options that are lost on their way into some process, that change an episode under way, or that an
    environment takes out of a dictionary that others still need."""
    worker = worker_of("optioned_envs:Optioned-v0", **kwargs)
    try:
        assert {level for row in levels(worker, 0, None) for level in row} == {-1}
        for row in levels(worker, 1, {"level": 2}):
            assert row[0] == -1
            assert row[-1] == 2
            assert row == sorted(row)
        # They stay with versions that say nothing new, and are replaced as a whole.
        assert {level for row in levels(worker, 2, {"level": 2}) for level in row} == {2}
        assert [row[-1] for row in levels(worker, 3, {"level": 5})] == [5, 5]
    finally:
        worker.close()


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_a_new_worker_begins_with_them(kwargs: dict[str, Any]) -> None:
    """Catches an actor that comes back, or a run whose callback sets options at its start, whose first episodes are
    those of no options."""
    worker = worker_of("optioned_envs:Optioned-v0", **kwargs)
    try:
        assert {level for row in levels(worker, 7, {"level": 3}) for level in row} == {3}
        # Only then: episodes under way go on.
        assert [row[0] for row in levels(worker, 8, {"level": 4})] == [3, 3]
    finally:
        worker.close()


@pytest.mark.parametrize("kwargs", KINDS, ids=str)
def test_settings_give_every_episode_options(kwargs: dict[str, Any]) -> None:
    """Catches a setting that first episodes, another vectorization or an evaluation lack, or that outlives a callback's
    options."""
    worker = worker_of("optioned_envs:Optioned-v0", reset_options={"level": 6}, **kwargs)
    try:
        for version in (0, 1):
            assert {level for row in levels(worker, version, None) for level in row} == {6}
        assert [row[-1] for row in levels(worker, 2, {"level": 2})] == [2, 2]
    finally:
        worker.close()
    options = AdapterOptions(reset_options={"level": 5}, vectorization=kwargs["vectorization"])
    env = make_vector_env("optioned_envs:Optioned-v0", 2, 1, options, True)
    shown = []

    def player(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        shown.append(obs.copy())
        return np.zeros(2, np.int64)

    try:
        assert play(env, player, 4).returns.size == 4
        assert {float(level) for obs in shown for level in obs.ravel()} == {5}
    finally:
        env.close()


def test_a_replaced_environment_gets_them_too() -> None:
    """Catches a fault that ends the curriculum of its slot."""
    env = make_env("optioned_envs:Optioned-v0", 1, 0)
    obs = np.zeros((1, 1), np.float32)
    env.reset(obs)
    env.set_options({"level": 4})  # type: ignore[attr-defined]
    env._vector.envs[0]._inner.close()  # type: ignore[attr-defined]
    env.reset(obs)
    assert obs[0, 0] == 4


TAKE_NONE: list[tuple[str, dict[str, Any], str]] = [
    ("recall", {}, "recall takes no options, got {'level': 1}"),
    ("optioned_envs:WithoutOptions-v0", {"vectorization": "native"}, "cannot take options"),
]


@pytest.mark.parametrize(("env_id", "kwargs", "expected"), TAKE_NONE)
def test_an_environment_that_takes_none_by_settings_is_named(
    env_id: str, kwargs: dict[str, Any], expected: str
) -> None:
    """Catches the same of a setting, before anything is trained."""
    del expected
    with pytest.raises((EnvironmentFault, ValueError), match=r"env\.reset_options is for|cannot take options"):
        make_env(env_id, 2, 0, reset_options={"level": 1}, **kwargs)


@pytest.mark.parametrize(("env_id", "kwargs", "expected"), TAKE_NONE)
def test_an_environment_that_takes_none_is_named(env_id: str, kwargs: dict[str, Any], expected: str) -> None:
    """Catches a curriculum that changes nothing, silently."""
    worker = worker_of(env_id, **kwargs)
    with pytest.raises(EnvironmentFault, match=expected):
        levels(worker, 0, {"level": 1})
    worker.close()
