"""``synthetic`` keeps the boundary contract and is what benchmarks think it is."""

from __future__ import annotations

from typing import Any

import boundary_contract as contract
import numpy as np
import pytest
from shoal.envs.boundary import StepRows, TokenSpace, VectorEnvironment
from shoal.envs.registry import list_env_ids, make_env_spec, make_vector_env
from shoal.envs.synthetic import POOL_ROWS, SyntheticEnvironment


@pytest.mark.parametrize("kwargs", [{}, {"together": True}, {"episode_length": 1}], ids=str)
def test_boundary_contract(kwargs: dict[str, Any]) -> None:
    """Catches what the checker of all adapters catches."""
    kwargs = {"episode_length": 20, **kwargs}
    env = make_vector_env("synthetic", 6, 7, **kwargs)
    assert isinstance(env, VectorEnvironment)
    rollout = contract.Rollout(env, contract.NUM_STEPS)
    contract.check_void_after_ends(rollout)
    contract.check_void_rows(rollout)
    contract.check_every_row_is_written(rollout)
    contract.check_seeds(("synthetic", 6, kwargs), rollout)
    assert not rollout.terminated.any()
    assert env.faults == []


def test_episodes_have_their_length_and_are_spread() -> None:
    """Catches an episode that is a step off, and slots that all end together where they should not."""
    rollout = contract.Rollout(SyntheticEnvironment(64, 0), 3 * 129)
    per_step = rollout.truncated.sum(0)
    assert per_step.max() <= 2
    for ended, short in zip(rollout.truncated, rollout.short, strict=True):
        ends = np.flatnonzero(ended)
        # 128 steps and the void one.
        assert set(np.diff(ends)) == {129}
        first_is_short = ends[0] < 127
        assert (short[: ends[0] + 1] == first_is_short).all()
        # The void step still belongs to what came before it.
        assert not short[ends[0] + 2 :].any()


def test_together_all_slots_end_in_the_same_step() -> None:
    """Catches staggering that cannot be turned off."""
    rollout = contract.Rollout(SyntheticEnvironment(4, 0, episode_length=10, together=True), 40)
    assert not rollout.short.any()
    np.testing.assert_array_equal(np.flatnonzero(rollout.truncated.all(0)), [9, 20, 31])
    assert rollout.truncated.sum() == 12


def test_tokens_lie_in_the_window_and_in_distinct_places() -> None:
    """Catches tokens that the network would ignore or that overwrite each other: less work than is said."""
    env = SyntheticEnvironment(POOL_ROWS, 0, num_features=3, window=5, num_tokens=40, used_tokens=30)
    space = env.spec.observation
    assert isinstance(space, TokenSpace)
    assert env.spec.obs_shape == (40, 3)
    obs = np.zeros((POOL_ROWS, 40, 3), dtype=np.uint8)
    env.reset(obs)
    coordinate, feature, value = np.moveaxis(obs[:, :30].astype(np.int64), -1, 0)
    assert (obs[:, 30:] == 0xFF).all()
    assert set(coordinate.ravel() >> 4) == set(coordinate.ravel() & 15) == set(range(5))
    assert set(feature.ravel()) == {0, 1, 2}
    assert value.min() >= 1
    place = np.sort(coordinate << 8 | feature, axis=1)
    assert (np.diff(place, axis=1) > 0).all()


def test_slots_and_steps_differ() -> None:
    """Catches a pool read at the same place by all: every batch would be one observation."""
    rollout = contract.Rollout(SyntheticEnvironment(8, 0), 20)
    seen = rollout.obs[:, 1:].reshape(160, -1)
    assert len(np.unique(seen, axis=0)) == 160
    assert len(np.unique(rollout.reward)) > 100


def test_it_is_registered_with_its_options() -> None:
    """Catches options that are dropped on the way from the id."""
    assert "synthetic" in list_env_ids()
    assert make_env_spec("synthetic?num_tokens=150", window=9).obs_shape == (150, 3)
    with pytest.raises(ValueError, match="windows"):
        make_vector_env("synthetic", 1, 0, windows=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_envs", 0),
        ("num_features", 257),
        ("window", 16),
        ("num_tokens", 0),
        ("used_tokens", 201),
        ("num_actions", 1),
        ("episode_length", 0),
        ("episode_length", 1.5),
        ("together", 1),
        ("step_seconds", -0.1),
        ("step_seconds", float("nan")),
        ("step_seconds", "1"),
    ],
)
def test_bad_options_are_refused(name: str, value: object) -> None:
    """Catches sizes that would fail far from where they were written."""
    options: dict[str, Any] = {"num_envs": 4, "seed": 0, name: value}
    with pytest.raises(ValueError, match=name):
        SyntheticEnvironment(**options)


def test_actions_out_of_range_are_refused() -> None:
    """Catches a policy built for another number of actions."""
    env = SyntheticEnvironment(2, 0, num_actions=3)
    obs = np.zeros((2, 200, 3), dtype=np.uint8)
    flags = [np.zeros(2, dtype=bool) for _ in range(3)]
    with pytest.raises(ValueError, match=r"0\.\.2"):
        env.step(np.array([0, 3]), StepRows(obs, flags[0], np.zeros(2, np.float32), flags[1], flags[2]))
