"""Environments that are registered nowhere, some with the interface of before gymnasium."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from echo_envs import EchoEnv, EchoVector
from gymnasium import spaces

BoxSpace = collections.namedtuple("BoxSpace", "low, high, shape, dtype")
DiscreteSpace = collections.namedtuple("DiscreteSpace", "n")


class Present(EchoEnv):
    """A class that nobody registered."""


class PresentVector(EchoVector):
    """A vector that nobody registered."""


def make_present(case: str) -> Present:
    """A function that makes one."""
    return Present(case)


def make_unannotated(case: str):  # type: ignore[no-untyped-def]
    """As a function that may do anything."""
    return Present(case)


def make_something(case: str) -> Any:
    """The same, with an annotation that says nothing."""
    return Present(case)


class Bare:
    """The methods of an environment without its spaces."""

    def reset(self) -> Any: ...

    def step(self, action: Any) -> Any: ...


class Old:
    """As crafter: no base class, spaces that are tuples, ``reset`` without a seed, four values."""

    def __init__(self, length: int = 3, cut: str = "", seed: int = 7) -> None:
        self.length, self.cut, self._seed, self.t = length, cut, seed, 0

    @property
    def observation_space(self) -> Any:
        return BoxSpace(0, 255, (9, 9, 3), np.uint8)

    @property
    def action_space(self) -> Any:
        return DiscreteSpace(4)

    @property
    def action_names(self) -> list[str]:
        return ["a"]

    def reset(self) -> np.ndarray:
        self.t = 0
        return self._obs()

    def step(self, action: int) -> Any:
        self.t += 1
        done = self.t == self.length
        info: dict[str, Any] = {"discount": 0.0 if done else 1.0}
        if done and self.cut == "discount":
            info["discount"] = 1.0
        if done and self.cut == "limit":
            info = {"TimeLimit.truncated": True}
        return self._obs(), 0.25, done, info

    def _obs(self) -> np.ndarray:
        return np.full((9, 9, 3), 10 * self._seed + self.t, np.uint8)


class OldSeeded(Old):
    """As the old gym: ``seed`` is a method."""

    def seed(self, seed: int) -> None:
        self._seed = seed % 20


class Nothing:
    """No environment."""


class Odd(Old):
    """A space that says nothing."""

    action_space = "anything"  # type: ignore[assignment]


class MultiBinary(NamedTuple):
    """As the old gym's, which has an n as Discrete has."""

    n: Any
    shape: tuple[int, ...]


class Flags(gymnasium.Env[Any, Any]):
    """An environment of gymnasium's with spaces of the old gym."""

    observation_space = MultiBinary(3, (3,))  # type: ignore[assignment]
    action_space = MultiBinary([2, 2], (2, 2))  # type: ignore[assignment]


class Unfinished(gymnasium.Env[Any, Any]):
    """One that forgets to set its spaces."""

    observation_space = None  # type: ignore[assignment]
    action_space = None  # type: ignore[assignment]


class Nested(Old):
    """Spaces within spaces, of the old names."""

    observation_space = collections.namedtuple("DictSpace", "spaces")(  # type: ignore[assignment]
        {"a": DiscreteSpace(3), "b": BoxSpace(-1, 1, (2,), np.float32)}
    )

    def _obs(self) -> Any:
        return {"a": 1, "b": np.zeros(2, np.float32)}


gymnasium.register("OldEnvsOwn-v0", Present)
CartPole = spaces.Discrete
