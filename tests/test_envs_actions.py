"""The policy's actions in the environment's terms: Dicts and Tuples of them, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from hypothesis import given
from hypothesis import strategies as st
from shoal.deploy.placement.setups import make_worker_setup
from shoal.deploy.settings.load import load_config
from shoal.envs.actions import action_converter, action_map, by_row, choices, policy_actions, row_of
from shoal.envs.boundary import ContinuousActions, DiscreteActions, EnvSpec, VectorSpace
from shoal.learner.described_policy import describe_policy
from shoal.policy.remap import Remapping, remap

OBSERVATION = spaces.Box(-1, 1, (3,), np.float32)


def discrete_leaves() -> st.SearchStrategy[Any]:
    small = st.integers(1, 3)
    return st.one_of(
        st.builds(lambda n, start: spaces.Discrete(n, start=start), small, st.integers(-2, 5)),
        st.lists(small, min_size=1, max_size=2).map(spaces.MultiDiscrete),
        st.integers(1, 2).map(spaces.MultiBinary),
    )


def float_boxes() -> st.SearchStrategy[Any]:
    shapes = st.sampled_from([(), (1,), (2,), (2, 2)])
    types = st.sampled_from([np.float32, np.float64])
    return st.builds(lambda shape, dtype, high: spaces.Box(-1, high, shape, dtype), shapes, types, st.integers(1, 5))


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def inside(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        several = st.lists(parts, min_size=1, max_size=3)
        return several.map(spaces.Tuple) | several.map(
            lambda some: spaces.Dict({f"k{i}": s for i, s in enumerate(some)})
        )

    return inside(leaves) | inside(inside(leaves))


def plain(action: Any) -> Any:
    """Comparable and hashable."""
    if isinstance(action, dict):
        return tuple(sorted((key, plain(value)) for key, value in action.items()))
    if isinstance(action, tuple):
        return tuple(map(plain, action))
    return tuple(np.asarray(action).reshape(-1).tolist())


@given(nested(discrete_leaves()))
def test_every_joint_choice_is_another_legal_action(space: Any) -> None:
    """Catches columns that go to the wrong part, a start that is added to a neighbour, two choices that are one action,
    and rows that gymnasium's own vector environments would cut otherwise.
    """
    actions = policy_actions(space, OBSERVATION, (), "id")
    assert isinstance(actions, DiscreteActions)
    assert not actions.scalar
    counts = [len(names) for names in actions.names]
    joint = np.array(list(itertools.islice(itertools.product(*map(range, counts)), 200)))
    batch = action_converter(space)(joint)
    rows = by_row(batch, len(joint))
    assert len({plain(row) for row in rows}) == len(joint)
    assert all(space.contains(row) for row in rows)
    cut = list(iterate(batch_space(space, len(joint)), batch))
    assert [plain(row) for row in rows] == [plain(row) for row in cut]
    parts = action_map(space)
    assert (parts.offset.shape, parts.low) == ((len(counts),), None)
    if choices(space):
        assert choices(space) == tuple(counts)


@given(nested(float_boxes()), st.integers(0, 2**32 - 1))
def test_numbers_of_nested_boxes_reach_their_bounds(space: Any, seed: int) -> None:
    """Catches bounds that belong to another part, and a type that is not the part's."""
    actions = policy_actions(space, OBSERVATION, (), "id")
    assert isinstance(actions, ContinuousActions)
    drawn = np.random.default_rng(seed).normal(0, 2, (5, len(actions.names))).astype(np.float32)
    batch = action_converter(space)(drawn)
    low, high = np.array(actions.low), np.array(actions.high)
    flat = np.array([spaces.flatten(space, row_of(batch, row)) for row in range(5)])
    # Dicts in the order of gymnasium, which is that of the layout.
    expected = np.clip(drawn * (high - low) / 2 + (high + low) / 2, low, high)
    np.testing.assert_allclose(flat, expected, rtol=1e-5, atol=1e-5)
    assert all(part.dtype == leaf.dtype for part, leaf in zip(leaves(batch), space_leaves(space), strict=True))
    one = action_map(space)
    assert one.low is not None
    mapped = np.clip(drawn * one.scale + one.offset, one.low, one.high)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | tuple):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value]


def space_leaves(space: Any) -> list[Any]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        inner = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return [leaf for part in inner for leaf in space_leaves(part)]
    return [space]


BOX = spaces.Box(0, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("action", "observation", "said"),
    [
        (spaces.Tuple((spaces.Discrete(2), BOX)), OBSERVATION, "does not choose both numbers and among choices"),
        (spaces.Dict({}), OBSERVATION, r"action space .* is not supported.*ActionWrapper"),
        (spaces.Dict(a=spaces.Text(3)), OBSERVATION, "is not supported.*a Dict or Tuple of choices"),
        (spaces.Tuple([spaces.Discrete(2)] * 2), spaces.Tuple([OBSERVATION] * 2), "several agents.*ParallelEnv"),
        (spaces.Tuple([BOX] * 3), spaces.Tuple([OBSERVATION] * 3), "several agents.*ParallelEnv"),
        (spaces.Discrete(10**9), OBSERVATION, "1,000,000,000 actions, at most 1,048,576"),
        (spaces.MultiDiscrete([10**6, 10**6]), OBSERVATION, "2,000,000 actions, at most 1,048,576"),
    ],
)
def test_what_one_policy_cannot_choose_is_refused(action: Any, observation: Any, said: str) -> None:
    """Catches several agents that are read as one, a name for each of a billion actions, and half an action."""
    with pytest.raises(ValueError, match=said):
        policy_actions(action, observation, (), "id")


@pytest.mark.parametrize(
    "observation",
    [spaces.Tuple((OBSERVATION, spaces.Discrete(2))), spaces.Tuple([OBSERVATION] * 3), spaces.Dict(a=BOX, b=BOX)],
)
def test_a_tuple_beside_other_observations_is_one_agents(observation: Any) -> None:
    """Catches an agent with two hands that is refused as two agents."""
    policy_actions(spaces.Tuple([spaces.Discrete(2)] * 2), observation, (), "id")


def worker(num_actions: int, **setup: Any) -> Any:
    names = (tuple(f"a{index}" for index in range(num_actions)),)
    spec = EnvSpec(env_id="id", observation=VectorSpace(size=2), actions=DiscreteActions(names=names))
    settings = setup.pop("settings", [])
    return make_worker_setup(load_config([], ["env.id=recall", *settings])[0], spec, run_id="r", **setup)


@pytest.mark.parametrize(("num_actions", "rows"), [(4, 100), (100, 100), (101, 101), (4672, 4672)])
def test_a_table_has_a_row_for_every_action(num_actions: int, rows: int) -> None:
    """Catches chess and go, which have more actions than the original's table rows, and a table that is no longer the
    original's for environments with fewer.
    """
    policy = worker(num_actions).make_policy()
    assert (policy.embedding_rows, policy.num_known_actions) == (rows, num_actions)
    with pytest.raises(ValueError, match=f"raise embedding_rows to {num_actions} or more"):
        worker(num_actions, settings=["policy.embedding_rows=3"]).make_policy()


def test_a_policy_that_goes_on_keeps_its_table() -> None:
    """Catches a table of the environment's size in place of the checkpoint's, whose weights then do not load."""
    described = describe_policy(worker(150, settings=["policy.embedding_rows=300"]).make_policy())
    presented = worker(150).presented
    interface = remap(described, *presented, Remapping())
    assert worker(150, interface=interface).make_policy().embedding_rows == 300
