"""Environments by the name of a class or function, ``module:Class``, also of libraries that know nothing of gymnasium.

What has the old interface (``reset`` answers an observation, ``step`` four values) is given the present one.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from shoal.envs.writers import short


@dataclasses.dataclass(frozen=True, slots=True)
class NamedMaker:
    """Makes an environment by calling what a module has under a name; plain data that crosses to other processes."""

    module: str
    name: str

    @property
    def target(self) -> Callable[..., Any]:
        """The class or function."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found

    def __call__(self, **kwargs: Any) -> Any:
        """Return a ``gymnasium.Env``, or a ``VectorEnv`` where that is made.

        Raises:
            ValueError: it makes no environment, or one with a space of no known kind.
        """
        env = self.target(**kwargs)
        if isinstance(env, (gymnasium.Env, VectorEnv)):
            return env
        missing = [name for name in ("reset", "step", "observation_space", "action_space") if not hasattr(env, name)]
        if missing:
            raise ValueError(
                f"{self.module}:{self.name} makes {short(env)}, which is no environment: it has no {', '.join(missing)}"
            )
        return OldEnvironment(env)


class OldEnvironment(gymnasium.Env[Any, Any]):
    """An environment that is no ``gymnasium.Env``, with either interface.

    Of the old one, ``done`` is a truncation where ``info`` says so: by ``TimeLimit.truncated``, or by a ``discount``
    of 1, which means that the future counts.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.observation_space = present_space(env.observation_space, "observation")
        self.action_space = present_space(env.action_space, "action")
        self.metadata = dict(getattr(env, "metadata", None) or {})
        self.render_mode = getattr(env, "render_mode", None)
        if callable(meanings := getattr(env, "get_action_meanings", None)):
            self.get_action_meanings = meanings
        self._takes_seed = "seed" in _parameters(env.reset)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; an environment that takes no seed has the one that it was made with."""
        super().reset(seed=seed)
        if seed is not None and not self._takes_seed and callable(reseed := getattr(self.env, "seed", None)):
            reseed(seed)
        answer = self.env.reset(**({"seed": seed} if self._takes_seed else {}))
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
            return answer[0], dict(answer[1])
        return answer, {}

    def step(self, action: Any) -> Any:
        """Step; four values become five, and anything else is returned for the guard to refuse."""
        answer = self.env.step(action)
        if not isinstance(answer, tuple) or len(answer) != 4:
            return answer
        obs, reward, done, info = answer
        cut = isinstance(info, Mapping) and bool(info.get("TimeLimit.truncated") or info.get("discount") == 1)
        return obs, reward, bool(done) and not cut, bool(done) and cut, info

    def render(self) -> Any:
        """Render, as the environment does."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment, if it can be."""
        if callable(close := getattr(self.env, "close", None)):
            close()


def present_space(space: Any, what: str) -> spaces.Space[Any]:
    """The gymnasium space that says what ``space`` does: one of the old ``gym``, or a tuple with the same names.

    Raises:
        ValueError: it says nothing that is known.
    """
    if isinstance(space, spaces.Space):
        return space
    if isinstance(inner := getattr(space, "spaces", None), Mapping):
        return spaces.Dict({key: present_space(part, what) for key, part in inner.items()})
    if isinstance(inner, (list, tuple)):
        return spaces.Tuple([present_space(part, what) for part in inner])
    if hasattr(space, "nvec"):
        return spaces.MultiDiscrete(space.nvec)
    if all(hasattr(space, name) for name in ("low", "high", "shape", "dtype")):
        return spaces.Box(space.low, space.high, tuple(space.shape), dtype=space.dtype)
    if hasattr(space, "n"):
        return spaces.Discrete(int(space.n), start=int(getattr(space, "start", 0)))
    raise ValueError(f"the {what} space is {short(space)}, must be a space of gymnasium or of the old gym")


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # made in C, which says nothing about itself
        return set()
