"""Wrappers of a user's, and environments whose answers show what became of actions, observations and rewards."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

LENGTH = 6
"""Steps of an episode, after which it is truncated by nobody and terminated by the environment."""


class Line(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows its step and the last action; the reward is ten times the step that begins.

    The action is a number of [-4, 4], and one outside is an error.
    """

    observation_space = spaces.Box(0, 10, (2,), np.float32)
    action_space = spaces.Box(-4, 4, (1,), np.float32)

    def __init__(self, length: int = LENGTH) -> None:
        self.length, self.time = length, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action), action
        self.time += 1
        obs = np.array([self.time, abs(float(action[0]))], np.float32)
        return obs, 10.0 * self.time, self.time == self.length, False, {}


class Lines(VectorEnv[Any, Any, Any]):
    """``Line`` as a native vector, whose slots all have the same step."""

    def __init__(self, num_envs: int, length: int = LENGTH, mode: str = "NEXT_STEP", **_: Any) -> None:
        self.num_envs, self.length, self.time = num_envs, length, 0
        self.metadata = {"autoreset_mode": AutoresetMode[mode]}
        self.single_observation_space, self.single_action_space = Line.observation_space, Line.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.time = 0
        return self._shown(np.zeros(self.num_envs)), {}

    def step(self, actions: np.ndarray) -> Any:
        assert self.action_space.contains(actions), actions
        mode, off = self.metadata["autoreset_mode"], np.zeros(self.num_envs, bool)
        if self.time == self.length:
            assert mode is AutoresetMode.NEXT_STEP
            return self.reset()[0], np.zeros(self.num_envs), off, off, {}
        self.time += 1
        obs, reward = self._shown(np.abs(actions[:, 0])), np.full(self.num_envs, 10.0 * self.time)
        ended = np.full(self.num_envs, self.time == self.length)
        infos: dict[str, Any] = {}
        if ended.all() and mode is AutoresetMode.SAME_STEP:
            infos = {"final_obs": obs, "_final_obs": ended, "final_info": {}, "_final_info": ended}
            obs, _ = self.reset()
        return obs, reward, ended, off, infos

    def _shown(self, actions: np.ndarray) -> np.ndarray:
        return np.stack([np.full(self.num_envs, self.time), actions], 1).astype(np.float32)


class Scaled(gymnasium.wrappers.TransformReward[Any, Any]):
    """Rewards by a factor and a sum: what gymnasium's own takes as a function is said by numbers."""

    def __init__(self, env: gymnasium.Env[Any, Any], factor: float = 1.0, plus: float = 0.0) -> None:
        super().__init__(env, lambda reward: factor * float(reward) + plus)


class ScaledVector(gymnasium.wrappers.vector.TransformReward):  # type: ignore[type-arg]
    """The same for vectors."""

    def __init__(self, env: VectorEnv[Any, Any, Any], factor: float = 1.0, plus: float = 0.0) -> None:
        super().__init__(env, lambda reward: factor * reward + plus)


class Halved(gymnasium.wrappers.TransformObservation[Any, Any, Any]):
    """Half of every observation."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env, lambda obs: obs / 2, env.observation_space)


def unwrapping(env: gymnasium.Env[Any, Any]) -> Any:
    """Forgets that it was to return an environment."""
    return gymnasium.vector.SyncVectorEnv([lambda: env])


gymnasium.register("Line-v0", Line, vector_entry_point=Lines)
