"""An environment whose observation is the step of its episode, with a step limit of 20 by gymnasium."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

LIMIT = 20


class Clock(gymnasium.Env[np.ndarray, int]):
    """Ends by itself after ``ends_at`` steps, fails once at step ``fails_at``, and reports its step as ``score``. With
    ``hidden`` its state cannot be told."""

    observation_space = spaces.Box(0, 1000, (1,), np.float32)
    action_space = spaces.Discrete(2)
    failed: ClassVar[bool] = False

    def __init__(self, ends_at: int = 0, fails_at: int = 0, hidden: bool = False) -> None:
        self.ends_at, self.fails_at, self.time = ends_at, fails_at, 0
        self.secret = iter(()) if hidden else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action: int) -> Any:
        self.time += 1
        if self.time == self.fails_at and not Clock.failed:
            Clock.failed = True
            raise OSError("the clock stopped")
        return self._observe(), 1.0, self.time == self.ends_at, False, {"score": self.time}

    def _observe(self) -> np.ndarray:
        return np.array([self.time], np.float32)


gymnasium.register("Clock-v0", Clock, max_episode_steps=LIMIT)
