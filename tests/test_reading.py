"""What a run says of an environment's spaces, in its first lines and in ``shoal doctor``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from shoal.envs.reading import reading, reading_by_part
from shoal.envs.spaces import Declared, make_spec

ONE = spaces.Discrete(2)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(-1, 1, (3,)), "as 3 numbers"),
        (spaces.Discrete(5), "as 5 numbers, each 0 or 1"),
        (spaces.Dict({"a": spaces.Box(0, 9, (2,)), "b": spaces.Discrete(4)}), "as 6 numbers, 4 of them 0 or 1"),
    ],
)
def test_codes_are_told_from_magnitudes(space: spaces.Space[Any], words: str) -> None:
    """Catches a code that is normalized, or a magnitude that is not, without a word."""
    assert reading(make_spec("E", Declared(space, ONE)))[0].endswith(words)


NONE = "; numbers without bounds are taken as they are, around [-1, 1]"
SINGLE = "; [-1, 1] is moved inside a single bound"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ([-1, -1], [1, 1], "2 numbers within [-1, 1]"),
        ([0, 0], [1000, 1000], "2 numbers within [0, 1000], onto which [-1, 1] is mapped"),
        ([-1, 0], [1, 5], "2 numbers within [-1, 1], [0, 5], onto which [-1, 1] is mapped"),
        ([-np.inf], [np.inf], f"1 number within [-inf, inf]{NONE}"),
        ([0], [np.inf], f"1 number within [0, inf]{SINGLE}"),
        ([-2e9], [2e9], f"1 number within [-inf, inf]{NONE}"),
        ([-1e38, -1e38], [1e38, 3], f"2 numbers within [-inf, 3], [-inf, inf]{SINGLE}{NONE}"),
        ([-2, -np.inf], [2, np.inf], f"2 numbers within [-inf, inf], [-2, 2], onto which [-1, 1] is mapped{NONE}"),
    ],
)
def test_the_mapping_of_actions_is_said(low: list[float], high: list[float], words: str) -> None:
    """Catches actions that reach the environment in other units than the policy's, without a word."""
    box = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    assert reading(make_spec("E", Declared(spaces.Box(-1, 1, (3,)), box)))[1] == words


def test_every_part_is_said() -> None:
    """Catches a part that is read as something else than its line says, such as an image as the numbers beside it."""
    space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (36, 36, 3), np.uint8),
            "goal": spaces.Dict({"at": spaces.Box(-1, 1, (2,)), "kind": spaces.Discrete(4)}),
            "flags": spaces.MultiBinary(3),
        }
    )
    assert dict(reading_by_part(make_spec("E", Declared(space, ONE)), lambda name: f"small {name}")) == {
        "camera": "uint8 (36, 36, 3) as an image (channels last) of 36 x 36 pixels with 3 channels, divided by 255, by "
        "a small camera CNN",
        "flags": "MultiBinary((3,)) as 3 numbers, each 0 or 1",
        "goal.at": "float32 (2,) as 2 numbers",
        "goal.kind": "Discrete(4) as 4 numbers, each 0 or 1",
    }
    pair = spaces.Tuple((spaces.Box(0, 1, ()), spaces.Discrete(2)))
    assert [name for name, _ in reading_by_part(make_spec("E", Declared(pair, ONE)))] == ["obs[0]", "obs[1]"]
    many = spaces.Dict({f"n{index}": spaces.Box(0, 1, (1,)) for index in range(60)})
    parts = reading_by_part(make_spec("E", Declared(many, ONE)))
    assert (len(parts), parts[-1]) == (41, ("...", "20 more"))
    assert reading_by_part(make_spec("E", Declared(spaces.Box(0, 1, (2,)), ONE))) == []
