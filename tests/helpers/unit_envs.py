"""CartPole, Pendulum and the memory task in other units: nothing to learn differs, only the numbers."""

from __future__ import annotations

import functools

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


class Recall(gymnasium.Env):
    """``envs.recall`` as one of gymnasium's: a cue, 4 to 8 blank steps, and a reward of 1 for who knows it."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (5,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        """Show the cue."""
        super().reset(seed=seed)
        self._cue, self._until_go = int(self.np_random.integers(4)), int(self.np_random.integers(4, 9)) + 1
        return np.eye(5, dtype=np.float32)[self._cue], {}

    def step(self, action):
        """A blank step, the go signal, or the answer's reward."""
        answered = self._until_go == 0
        self._until_go -= 1
        obs = np.zeros(5, np.float32)
        obs[4] = self._until_go == 0
        return obs, float(answered and action == self._cue), answered, False, {}


def _make(construct):
    def make(reward: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> gymnasium.Env:
        return InUnits(construct(), reward, scale, shift)

    return make


for _name in ("CartPole-v1", "Pendulum-v1"):
    _constructor = functools.partial(gymnasium.make, _name)
    gymnasium.register(_name.replace("-v1", "InUnits-v1"), entry_point=_make(_constructor))
gymnasium.register("RecallInUnits-v1", entry_point=_make(Recall))
