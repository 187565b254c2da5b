"""The environments of all peers: for speed nearly free ones in numpy alone, the same work as shoal's ``synthetic``.

Observations are 200 tokens x 3 uint8, half of them padding (``free``), or 4 images of 84 x 84 uint8 (``images``),
copied from a pool; rewards are small numbers from a pool; episodes are truncated every 128 steps, slots spread over the
phases of an episode. Each adapter dresses it in its peer's vector interface.
"""

from __future__ import annotations

import gymnasium
import numpy as np
from network import IMAGE_SHAPE, NUM_ACTIONS, NUM_FEATURES, NUM_TOKENS, WINDOW
from tasks import TASKS, Task

USED_TOKENS = 100
EPISODE_LENGTH = 128
FREE = ("free", "images")
POOL_ROWS = 1024
POOL_STRIDE = 331


class FreeEnvironment:
    """B slots. ``next_step`` is gymnasium's autoreset mode: the call after an end ignores the action and only resets;
    otherwise the call in which an episode ends returns the next one's first observation."""

    def __init__(self, num_envs: int, seed: int, *, next_step: bool, images: bool = False) -> None:
        self.num_envs = num_envs
        self._next_step = next_step
        self._rng = np.random.default_rng(seed)
        rows = POOL_ROWS + num_envs
        self._obs = self._rng.integers(0, 256, (rows, *IMAGE_SHAPE), np.uint8) if images else self._make_tokens(rows)
        self._reward = self._rng.normal(scale=0.1, size=rows).astype(np.float32)
        self._offset = 0
        self._until_end = np.zeros(num_envs, dtype=np.int64)
        self.final_obs = self._observe()
        """Stands for what the slots saw last before the present step's resets."""

    def reset(self) -> np.ndarray:
        """uint8 [B, NUM_TOKENS, 3], or [B, 4, 84, 84]."""
        spread = (np.arange(self.num_envs) + 1.0 - self._rng.random()) / self.num_envs
        self._until_end = np.maximum(1, np.rint(EPISODE_LENGTH * spread)).astype(np.int64)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Observations as ``reset``, rewards float32 [B], terminations and truncations bool [B], all newly
        made. The action changes nothing."""
        reward = self._reward[self._offset : self._offset + self.num_envs].copy()
        if self._next_step:
            first = self._until_end == 0
            reward[first] = 0.0
        self._until_end -= 1
        if self._next_step:
            self._until_end[first] = EPISODE_LENGTH
        truncated = self._until_end == 0
        if not self._next_step:
            self._until_end[truncated] = EPISODE_LENGTH
        self.final_obs = self._observe()
        return self.final_obs, reward, np.zeros(self.num_envs, dtype=bool), truncated

    def _observe(self) -> np.ndarray:
        self._offset = (self._offset + POOL_STRIDE) % POOL_ROWS
        return self._obs[self._offset : self._offset + self.num_envs].copy()

    def _make_tokens(self, rows: int) -> np.ndarray:
        pool = np.full((rows, NUM_TOKENS, 3), 0xFF, dtype=np.uint8)
        places = np.arange(NUM_FEATURES * WINDOW * WINDOW)
        chosen = np.sort([self._rng.choice(places, USED_TOKENS, replace=False) for _ in range(rows)], axis=1)
        cell, feature = chosen // NUM_FEATURES, chosen % NUM_FEATURES
        pool[:, :USED_TOKENS, 0] = (cell // WINDOW) << 4 | cell % WINDOW
        pool[:, :USED_TOKENS, 1] = feature
        pool[:, :USED_TOKENS, 2] = self._rng.integers(1, 256, size=chosen.shape)
        return pool


def make_environment(name: str, num_envs: int, seed: int, *, next_step: bool) -> FreeEnvironment | Task:
    """``free``, ``images``, or a task of ``tasks.py``."""
    if name in FREE:
        return FreeEnvironment(num_envs, seed, next_step=next_step, images=name == "images")
    return TASKS[name](num_envs, seed, next_step=next_step)


def spaces(name: str) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Discrete]:
    """The observation and action spaces of one slot."""
    if name in FREE:
        shape = IMAGE_SHAPE if name == "images" else (NUM_TOKENS, 3)
        return gymnasium.spaces.Box(0, 255, shape, np.uint8), gymnasium.spaces.Discrete(NUM_ACTIONS)
    task = TASKS[name]
    box = gymnasium.spaces.Box(task.low, task.high, (task.size,), np.float32)
    return box, gymnasium.spaces.Discrete(task.num_actions)
