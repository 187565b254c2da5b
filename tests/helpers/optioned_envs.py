"""Environments whose episodes show the option that they began with, as ``optioned_envs:Optioned`` and others."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

LENGTH = 3


class Optioned(gymnasium.Env[Any, Any]):
    """Shows the option ``level``, -1 without options, for episodes of three steps."""

    observation_space = spaces.Box(-10, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.level = 0, -1 if options is None else options.pop("level")
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._obs(), 0.0, self.steps == LENGTH, False, {}

    def _obs(self) -> np.ndarray:
        return np.full(1, self.level, np.float32)


class Lasting(Optioned):
    """Lasts for ``steps`` steps, an option."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.lasts = LENGTH if options is None else options["steps"]
        return super().reset(seed=seed, options={"level": self.lasts})

    def step(self, action: Any) -> Any:
        obs, reward, _, _, info = super().step(action)
        return obs, reward, self.steps == self.lasts, False, info


class Native(VectorEnv[Any, Any, Any]):
    """The same, stepped all slots at once."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012  (gymnasium's own form)

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Optioned.observation_space, Optioned.action_space
        self.observation_space = spaces.Box(-10, 10, (num_envs, 1), np.float32)
        self.action_space = spaces.MultiDiscrete([2] * num_envs)
        self.next = -1

    def set_options(self, options: dict[str, Any]) -> None:
        self.next = options["level"]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        self.steps, self.level = 0, self.next
        return self._obs(), {}

    def step(self, actions: Any) -> Any:
        self.steps += 1
        over = np.full(self.num_envs, self.steps == LENGTH)
        final, info = self._obs(), {}
        if over.any():
            self.steps, self.level = 0, self.next
            info = {"final_obs": final, "_final_obs": over}
        return self._obs(), np.zeros(self.num_envs), over, np.zeros(self.num_envs, bool), info

    def _obs(self) -> np.ndarray:
        return np.full((self.num_envs, 1), self.level, np.float32)


class WithoutOptions(Native):
    """A vector environment of somebody who never thought of options."""

    set_options = None  # type: ignore[assignment]


gymnasium.register("Optioned-v0", entry_point=Optioned, vector_entry_point=Native)
gymnasium.register("WithoutOptions-v0", entry_point=Optioned, vector_entry_point=WithoutOptions)
