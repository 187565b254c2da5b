"""An environment whose nearest reward leads away from the one that counts."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

STREAK = 5


class Tempting(gymnasium.Env[np.ndarray, np.int64]):
    """Action 0 earns 1 at once; ``STREAK`` times action 1 in a row earn 200, which random play often comes to."""

    observation_space = spaces.Box(0, 1, (STREAK,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin without a streak."""
        super().reset(seed=seed, options=options)
        self._streak = 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Break the streak, or lengthen it."""
        self._streak = self._streak + 1 if action else 0
        reward = 200.0 if self._streak == STREAK else float(not action)
        self._streak %= STREAK
        return self._observe(), reward, False, False, {}

    def _observe(self) -> np.ndarray:
        return np.eye(STREAK, dtype=np.float32)[self._streak]


gymnasium.register("Tempting-v0", entry_point=Tempting, max_episode_steps=32)
