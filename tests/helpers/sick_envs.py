"""Environments that can be made and looked at, and that fail, or never answer, once they are played."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Healthy(gymnasium.Env[np.ndarray, Any]):
    """Episodes of nine steps."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space: spaces.Space[Any] = spaces.Discrete(2)
    t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.zeros(3, np.float32), 0.0, self.t == 9, False, {}


class ResetRaises(Healthy):
    def reset(self, **kwargs: Any) -> Any:
        raise RuntimeError("no ROM")


class NoSeed(Healthy):
    def reset(self) -> Any:  # type: ignore[override]  # which is the fault
        return np.zeros(3, np.float32), {}


class FourValues(Healthy):
    def step(self, action: Any) -> Any:
        return super().step(action)[1:]


class WordReward(Healthy):
    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, "one", *rest


class VectorReward(Healthy):
    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, np.ones(2), *rest


class NoObservation(Healthy):
    def step(self, action: Any) -> Any:
        return None, *super().step(action)[1:]


class FailsAtTheSeventh(Healthy):
    def step(self, action: Any) -> Any:
        if self.t == 6:
            raise ValueError("sometimes")
        return super().step(action)


class Counted(Healthy):
    """Writes a line for each that is made."""

    def __init__(self) -> None:
        with open(os.environ["SICK_ENVS_MADE"], "a") as file:
            file.write("made\n")


class Endless(Healthy):
    def step(self, action: Any) -> Any:
        return np.zeros(3, np.float32), 0.0, False, False, {}


class Outside(Healthy):
    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        return obs + 5, *rest


class Dies(Healthy):
    def step(self, action: Any) -> Any:
        os._exit(3)


class Masked(Healthy):
    """Every action but one is illegal, and fails."""

    action_space = spaces.Discrete(50)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], {"action_mask": np.arange(50) == 7}

    def step(self, action: Any) -> Any:
        assert action == 7, "illegal"
        return *super().step(action)[:4], {"action_mask": np.arange(50) == 7}


class HangsWhenMade(Healthy):
    def __init__(self) -> None:
        time.sleep(1000)


class HangsInReset(Healthy):
    def reset(self, **kwargs: Any) -> Any:
        time.sleep(1000)


class HangsInStep(Healthy):
    def step(self, action: Any) -> Any:
        time.sleep(1000)
