"""Rows are read back as the observations that they were written from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from echo_envs import CASES
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.envs.config import AdapterOptions
from shoal.envs.readers import action_reader, observation_reader
from shoal.envs.registry import make_env_spec
from shoal.envs.spaces import Declared, make_spec
from shoal.envs.writers import make_writer

LEAVES = st.one_of(
    st.builds(
        lambda shape, dtype: spaces.Box(0, 9, tuple(shape), dtype),
        st.lists(st.integers(1, 3), max_size=2),
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
    ),
    st.builds(spaces.Discrete, st.integers(1, 5), start=st.integers(-3, 3)),
    st.builds(
        lambda nvec, start: spaces.MultiDiscrete(nvec, start=[start] * len(nvec)),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
        st.integers(-2, 2),
    ),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
    st.just(spaces.Box(0, 255, (40, 44, 3), np.uint8)),
)
SPACES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=5,
)


def check_equal(space: spaces.Space[Any], found: Any, wanted: list[Any]) -> None:
    """A batch against observations one by one."""
    if isinstance(space, spaces.Dict):
        assert list(found) == list(space.spaces)
        for key, inner in space.spaces.items():
            check_equal(inner, found[key], [obs[key] for obs in wanted])
    elif isinstance(space, spaces.Tuple):
        assert isinstance(found, tuple)
        for index, inner in enumerate(space.spaces):
            check_equal(inner, found[index], [obs[index] for obs in wanted])
    else:
        assert found.dtype == space.dtype
        np.testing.assert_array_equal(found, np.stack(wanted).astype(np.float32).astype(space.dtype))


@settings(max_examples=60, deadline=None)
@given(SPACES, st.integers(0, 2**31))
def test_reading_undoes_writing(space: spaces.Space[Any], seed: int) -> None:
    """Catches parts that change places, one-hot codes without their start, axes that are turned the wrong way."""
    space.seed(seed)
    spec = make_spec("it", Declared(space, spaces.Discrete(2)), AdapterOptions(image_layout="auto"))
    wanted = [space.sample() for _ in range(3)]
    rows = np.empty((3, *spec.obs_shape), spec.obs_dtype)
    write = make_writer(space, spec, batched=False)
    for row, obs in enumerate(wanted):
        write(obs, rows[row : row + 1].reshape(1, -1))
    _, read = observation_reader(spec)
    check_equal(space, read(rows), wanted)


@pytest.mark.parametrize(
    "case", ["stack", "channels first", "stack of colours", "stack, channels first", "float first"]
)
def test_images_keep_their_axes(case: str) -> None:
    """Catches frames of a stack in the place of channels."""
    space = CASES[case].space
    spec = make_spec("it", Declared(space, spaces.Discrete(2)), AdapterOptions())
    rows = np.empty((1, *spec.obs_shape), spec.obs_dtype)
    wanted = CASES[case].obs(3)
    make_writer(space, spec, batched=False)(wanted, rows.reshape(1, -1))
    np.testing.assert_array_equal(observation_reader(spec)[1](rows)[0], wanted.astype(np.float32).astype(wanted.dtype))


def test_the_largest_integers_stay_in_their_type() -> None:
    """Catches 2**63 - 1, rounded up to 2**63 in float32, coming back as the least integer of all."""
    space = spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64)
    spec = make_spec("it", Declared(space, spaces.Discrete(2)), AdapterOptions())
    _, read = observation_reader(spec)
    (high,), (low,) = read(np.array([[2.0**63], [-(2.0**63)]], np.float32)).tolist()
    assert 2**63 - 2**40 < high < 2**63
    assert low == -(2**63)


@pytest.mark.parametrize("env_id", ["recall", "synthetic", "mettagrid/forage"])
def test_our_own_environments_have_spaces(env_id: str) -> None:
    """Catches a space that the rows of an environment without declared ones are no members of."""
    if env_id.startswith("mettagrid"):
        pytest.importorskip("mettagrid")
    spec = make_env_spec(env_id)
    space, read = observation_reader(spec)
    assert space.contains(read(np.zeros((2, *spec.obs_shape), spec.obs_dtype))[1])
    actions, convert = action_reader(spec)
    assert actions.contains(convert(np.zeros((2, *spec.action_shape), spec.action_dtype))[1])
