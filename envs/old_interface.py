"""Environments of libraries that know nothing of gymnasium, whose interface may be that of before it.

What has the old interface (``reset`` answers an observation, ``step`` four values) is given the present one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from shoal.envs.arguments import parameters
from shoal.envs.writers import short


class OldEnvironment(gymnasium.Env[Any, Any]):
    """An environment that is no ``gymnasium.Env``, with either interface.

    Of the old one, ``done`` is a truncation where ``info`` says so: by ``TimeLimit.truncated``, or by a ``discount``
    of 1, which means that the future counts.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.observation_space = present_space(env.observation_space, "the observation space")
        self.action_space = present_space(env.action_space, "the action space")
        self.metadata = dict(getattr(env, "metadata", None) or {})
        self.render_mode = getattr(env, "render_mode", None)
        if callable(meanings := getattr(env, "get_action_meanings", None)):
            self.get_action_meanings = meanings
        self._takes_seed = "seed" in parameters(env.reset)

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
    if type(space).__name__ == "MultiBinary":  # which has an n, too, as Discrete
        return spaces.MultiBinary(tuple(np.atleast_1d(space.n).tolist()))
    if all(hasattr(space, name) for name in ("low", "high", "shape", "dtype")):
        return spaces.Box(space.low, space.high, tuple(space.shape), dtype=space.dtype)
    if hasattr(space, "n"):
        return spaces.Discrete(int(space.n), start=int(getattr(space, "start", 0)))
    raise ValueError(f"{what} is {short(space)}, must be a space of gymnasium or of the old gym")
