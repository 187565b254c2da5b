"""Read rows of numbers back as observations of gymnasium's spaces: the inverse of ``envs.writers``."""

# N rows, one after the other

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gymnasium import spaces
from shoal.envs.actions import action_converter
from shoal.envs.boundary import ContinuousActions, EnvSpec, ImageSpace, TokenSpace
from shoal.envs.spaces import declared_from_json
from shoal.envs.writers import Place, parts_of, places_of

Reader = Callable[[np.ndarray], Any]
"""rows [N, ...] -> a batch of observations or actions: an array [N, ...], or a dict or tuple of them."""


def observation_reader(spec: EnvSpec) -> tuple[spaces.Space[Any], Reader]:
    """A slot's observation space, in the environment's own terms, and the reader of rows [N, *obs_shape].

    Numbers that were wider than float32 come back rounded to it. Where the environment declares no spaces the space is
    that of the rows.
    """
    if spec.spaces is None:
        if isinstance(spec.observation, TokenSpace):
            return spaces.Box(0, 255, spec.obs_shape, np.uint8), np.asarray
        if isinstance(spec.observation, ImageSpace) and spec.obs_dtype == np.uint8:
            return spaces.Box(0, 255, spec.obs_shape, np.uint8), np.asarray
        return spaces.Box(-np.inf, np.inf, spec.obs_shape, np.float32), np.asarray
    space = declared_from_json(spec.spaces).observation
    if isinstance(spec.observation, TokenSpace):
        return space, np.asarray
    if isinstance(spec.observation, ImageSpace):
        return space, _box_reader(space, spec.observation.axes)
    if spec.byte_parts or isinstance(space, (spaces.Dict, spaces.Tuple)):
        return space, _space_reader(space, places_of(space, spec))
    return space, _leaf_reader(space, None)


def action_reader(spec: EnvSpec) -> tuple[spaces.Space[Any], Reader]:
    """A slot's action space, in the environment's own terms, and the converter of actions [N, *action_shape]."""
    if spec.spaces is not None:
        space = declared_from_json(spec.spaces).action
        return space, action_converter(space)
    actions = spec.actions
    if isinstance(actions, ContinuousActions):
        low, high = np.asarray(actions.low, np.float32), np.asarray(actions.high, np.float32)
        space = spaces.Box(low, high)
        return space, action_converter(space)
    counts = [len(names) for names in actions.names]
    return (spaces.Discrete(counts[0]) if actions.scalar else spaces.MultiDiscrete(counts)), np.asarray


def other_keys(space: spaces.Space[Any]) -> list[Any]:
    """Keys of Dicts in the space that are no strings."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return []
    own = [key for key, _ in parts_of(space) if isinstance(space, spaces.Dict) and not isinstance(key, str)]
    return own + [key for _, inner in parts_of(space) for key in other_keys(inner)]


def _space_reader(space: spaces.Space[Any], places: Iterator[Place]) -> Reader:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [(key, _space_reader(inner, places)) for key, inner in parts_of(space)]
        if isinstance(space, spaces.Dict):
            return lambda rows: {key: read(rows) for key, read in parts}
        return lambda rows: tuple(read(rows) for _, read in parts)
    place = next(places)
    read = _leaf_reader(space, place.axes)
    return lambda rows: read(place.of(rows))


def _leaf_reader(space: spaces.Space[Any], axes: tuple[int, ...] | None) -> Reader:
    if isinstance(space, spaces.Box):
        return _box_reader(space, axes)
    if isinstance(space, spaces.Discrete):
        return lambda rows: rows.argmax(1) + space.start
    if isinstance(space, spaces.MultiDiscrete):
        ends = np.cumsum(space.nvec.reshape(-1))[:-1]
        return lambda rows: (
            np.stack([choice.argmax(1) for choice in np.split(rows, ends, axis=1)], axis=1).reshape(-1, *space.shape)
            + space.start
        ).astype(space.dtype)
    return lambda rows: rows.reshape(-1, *(space.shape or ())).astype(space.dtype)


def _box_reader(space: spaces.Space[Any], axes: tuple[int, ...] | None) -> Reader:
    """``axes``: the order in which rows have the box's axes; None is its own."""
    shape = space.shape or ()
    order = tuple(range(len(shape))) if axes is None else axes
    back = (0, *(1 + order.index(axis) for axis in range(len(shape))))

    def read(rows: np.ndarray) -> np.ndarray:
        there = rows.reshape(-1, *(shape[axis] for axis in order)).transpose(back)
        if np.issubdtype(space.dtype, np.integer):
            # float32 rounds the largest integers up, past the end of their type.
            limits = np.iinfo(space.dtype)
            return np.clip(there, limits.min, np.nextafter(limits.max + 1.0, 0.0)).astype(space.dtype)
        return np.ascontiguousarray(there, space.dtype)

    return read
