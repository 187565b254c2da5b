"""CartPole and Pendulum in other units: nothing to learn differs, only the numbers."""

from __future__ import annotations

import gymnasium
import numpy as np


class InUnits(gymnasium.ObservationWrapper, gymnasium.utils.RecordConstructorArgs):
    """Rewards times ``reward``, observations times ``scale`` plus ``shift``."""

    def __init__(self, env: gymnasium.Env, reward: float, scale: float, shift: float) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, reward=reward, scale=scale, shift=shift)
        super().__init__(env)
        self._reward, self._scale, self._shift = reward, scale, shift
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The same observation in other units."""
        return (observation * self._scale + self._shift).astype(np.float32)

    def step(self, action):
        """The same step, its reward in another unit."""
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, float(reward) * self._reward, terminated, truncated, info


def _make(name: str):
    def make(reward: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> gymnasium.Env:
        return InUnits(gymnasium.make(name), reward, scale, shift)

    return make


for _name in ("CartPole-v1", "Pendulum-v1"):
    gymnasium.register(_name.replace("-v1", "InUnits-v1"), entry_point=_make(_name))
