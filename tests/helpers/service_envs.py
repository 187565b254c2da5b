"""Environments that tests break on purpose, as ``service_envs:Scripted-v0``; Ray's workers import this module too."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi": spaces.MultiDiscrete([2, 3]),
    "continuous": spaces.Box(-2.0, 2.0, (1,), np.float32),
}


class Scripted(gymnasium.Env[np.ndarray, Any]):
    """Shows (seed's high half, seed's low half, episode, step of the episode); the reward is the step's number.

    Episode k is ``length`` + k % 3 steps long, terminated or truncated in turn. From step ``at`` of an instance on, it
    breaks in the way ``how`` (of several with commas between, the next one); with a ``marker`` file only the first that
    gets there does.
    """

    broken = 0

    observation_space = spaces.Box(0, 2**16, (4,), dtype=np.float32)

    def __init__(
        self,
        how: str = "",
        at: int = 0,
        length: int = 5,
        marker: str = "",
        actions: str = "discrete",
        seconds: float = 0.0,
    ) -> None:
        self.action_space = ACTIONS[actions]
        self.how, self.at, self.length, self.marker, self.seconds = how, at, length, marker, seconds
        self.seed, self.episode, self.step_, self.total = 0, -1, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed = self.seed if seed is None else seed
        self.episode, self.step_ = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.step_, self.total = self.step_ + 1, self.total + 1
        time.sleep(self.seconds)
        over = self.step_ == self.length + self.episode % 3
        answer = [self._obs(), float(self.step_), over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}]
        if self.how and self.total >= self.at and self._first():
            ways = self.how.split(",")
            Scripted.broken += 1
            match ways[Scripted.broken % len(ways)]:
                case "raises":
                    raise RuntimeError("lost the plot")
                case "hangs":
                    time.sleep(3600)
                case "exits":
                    os._exit(3)
                case "eats":
                    self.memory = np.ones(2**29)  # 4 GiB
                    time.sleep(3600)
                case "dawdles":
                    self.how, self.seconds = "", 0.1
                case "nan":
                    answer[0] = np.full(4, np.nan, np.float32)
                case "shape":
                    answer[0] = np.zeros(5, np.float32)
                case "dtype":
                    answer[0] = np.array(["a", "b", "c", "d"])
                case "reward":
                    answer[1] = float("inf")
        return tuple(answer)

    def _first(self) -> bool:
        if not self.marker:
            return True
        try:
            Path(self.marker).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _obs(self) -> np.ndarray:
        return np.array([self.seed >> 16, self.seed & 0xFFFF, self.episode, self.step_], np.float32)


gymnasium.register("Scripted-v0", "service_envs:Scripted")
