"""Spaces in checkpoints."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from shoal.envs.boundary import TokenSpace
from shoal.envs.masks import MaskSource
from shoal.envs.space_json import space_from_json, space_to_json
from shoal.envs.spaces import Declared, declared_from_json, declared_to_json

BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    "space",
    [
        BOX,
        spaces.Box(np.array([-np.inf, 0.1]), np.array([np.inf, 0.2]), dtype=np.float64),
        spaces.Box(-np.inf, np.inf, (), np.float32),
        spaces.Box(0, 255, (4, 5, 3), np.uint8),
        spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64),
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [0, 0]]),
        spaces.MultiBinary([2, 2]),
        spaces.Dict(z=BOX, a=spaces.Dict(b=spaces.Discrete(2))),
        spaces.Dict([("z", BOX), ("a", spaces.Discrete(2))]),
        spaces.Tuple([spaces.Discrete(2), BOX]),
    ],
    ids=str,
)
def test_a_space_comes_back_equal(space: spaces.Space[Any]) -> None:
    """Catches bounds that lose digits or infinities, and parts in another order: a policy would read other columns."""
    back = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert back == space
    if isinstance(space, spaces.Dict):
        assert isinstance(back, spaces.Dict)
        assert list(back.spaces) == list(space.spaces)


def test_bounds_of_an_image_are_one_number_each() -> None:
    """Catches checkpoints of megabytes."""
    assert len(json.dumps(space_to_json(spaces.Box(0, 255, (210, 160, 3), np.uint8)))) < 200


def test_tokens_and_action_names_come_back() -> None:
    """Catches a policy that no longer knows its features and actions by name."""
    tokens = TokenSpace(
        width=3,
        height=3,
        num_tokens=4,
        feature_names=("tag", "ore"),
        feature_normalizations=(1.0, 2.0),
        categorical_features=((0, ("mine", "altar")),),
    )
    declared = Declared(spaces.Box(0, 255, (4, 3), np.uint8), spaces.Discrete(2), tokens, ("left", "right"))
    assert declared_from_json(json.loads(json.dumps(declared_to_json(declared)))) == declared
    declared = dataclasses.replace(declared, mask=MaskSource("obs", (2,), "board"))
    assert declared_from_json(json.loads(json.dumps(declared_to_json(declared)))) == declared
