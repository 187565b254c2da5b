"""Two memory tasks that every system learns, in numpy alone and all slots at once: POPGym's RepeatPrevious and
PositionOnlyCartPole (Morad et al. 2023, arXiv:2303.01859), with 0.1 for what counts 1 / (length of an episode) there.
"""

from __future__ import annotations

import abc
import itertools
import math
import os
import time
from pathlib import Path

import numpy as np

REWARD = 0.1
"""The reward of a step that is right: as small as POPGym's it would starve losses that do not normalise."""


class Episodes:
    """Writes down what was played, where ``PEERS_EPISODES`` names a directory: a file per environment, a line for every
    few episodes that ended: time.monotonic(), environment steps so far, number of episodes, sum of their returns.
    """

    _numbers = itertools.count()

    def __init__(self, num_envs: int) -> None:
        directory = os.environ.get("PEERS_EPISODES")
        name = f"{os.getpid()}-{next(self._numbers)}"
        self._file = Path(directory, name).open("w", buffering=1) if directory else None  # noqa: SIM115  (open until the process ends)
        self._return = np.zeros(num_envs)
        self._steps = self._ended = 0
        self._sum = 0.0

    def add(self, steps: int, reward: np.ndarray, ended: np.ndarray) -> None:
        """``steps`` slots stepped."""
        if self._file is None:
            return
        if not self._steps:
            self._file.write(f"{time.monotonic()} 0 0 0\n")
        self._steps += steps
        self._return += reward
        if ended.any():
            self._ended += int(ended.sum())
            self._sum += float(self._return[ended].sum())
            self._return[ended] = 0.0
            if self._ended >= 8:
                self._file.write(f"{time.monotonic()} {self._steps} {self._ended} {self._sum}\n")
                self._ended, self._sum = 0, 0.0


class Task(abc.ABC):
    """B slots. ``next_step`` is gymnasium's autoreset mode: the call after an end ignores the action and only resets;
    otherwise the call in which an episode ends returns the next one's first observation."""

    size: int
    """Size of an observation, float32."""
    low: float
    high: float
    num_actions: int
    best_return: float

    def __init__(self, num_envs: int, seed: int, *, next_step: bool) -> None:
        self.num_envs = num_envs
        self.final_obs = np.zeros((num_envs, self.size), np.float32)
        """The last observations before the present step's resets."""
        self._next_step = next_step
        self._rng = np.random.default_rng(seed)
        self._over = np.zeros(num_envs, dtype=bool)
        self._episodes = Episodes(num_envs)

    def reset(self) -> np.ndarray:
        """float32 [B, size]."""
        self._begin(np.ones(self.num_envs, dtype=bool))
        self._over[:] = False
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Observations, rewards float32 [B], terminations and truncations bool [B], all newly made."""
        reward, terminated, truncated = self._advance(np.asarray(action))
        played = self.num_envs
        if self._next_step:
            reward[self._over] = 0.0
            terminated[self._over] = truncated[self._over] = False
            played -= int(self._over.sum())
            self._begin(self._over)
        self._over = terminated | truncated
        self._episodes.add(played, reward, self._over)
        obs = self._observe()
        if not self._next_step and self._over.any():
            self.final_obs = obs
            self._begin(self._over)
            obs = self._observe()
        return obs, reward, terminated, truncated

    @abc.abstractmethod
    def _begin(self, chosen: np.ndarray) -> None:
        """New episodes in the slots chosen by bool [B]."""

    @abc.abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All slots; rewards, terminations and truncations, newly made."""

    @abc.abstractmethod
    def _observe(self) -> np.ndarray:
        """float32 [B, size], newly made."""


class RepeatPrevious(Task):
    """A deck of 52 cards; its suits are shown one by one, one-hot, and the action names the one three cards back.

    Scored from the fourth card on: 48 times a game, right or wrong. Without memory one in four is right.
    """

    size, low, high, num_actions = 4, 0.0, 1.0, 4
    back = 3
    cards = 52
    best_return = REWARD * (cards - 1 - back)

    def __init__(self, num_envs: int, seed: int, *, next_step: bool) -> None:
        super().__init__(num_envs, seed, next_step=next_step)
        self._deck = np.tile(np.arange(self.cards) % 4, (num_envs, 1))
        self._at = np.zeros(num_envs, dtype=np.int64)
        self._slots = np.arange(num_envs)
        self._one_hot = np.eye(4, dtype=np.float32)

    def _begin(self, chosen: np.ndarray) -> None:
        self._deck[chosen] = self._rng.permuted(self._deck[chosen], axis=1)
        self._at[chosen] = 0

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        asked = self._deck[self._slots, np.maximum(self._at - self.back, 0)]
        reward = np.where(action == asked, REWARD, -REWARD) * (self._at >= self.back)
        # A slot whose game is over stays on its last card until it begins anew.
        self._at = np.minimum(self._at + 1, self.cards - 1)
        return reward.astype(np.float32), np.zeros(self.num_envs, dtype=bool), self._at == self.cards - 1

    def _observe(self) -> np.ndarray:
        return self._one_hot[self._deck[self._slots, self._at]]


class PositionOnlyCartPole(Task):
    """gymnasium's CartPole-v1 with its dynamics and limits, but only the positions are seen, and 200 steps are all."""

    size, low, high, num_actions = 2, -math.inf, math.inf, 2
    length = 200
    best_return = REWARD * length

    def __init__(self, num_envs: int, seed: int, *, next_step: bool) -> None:
        super().__init__(num_envs, seed, next_step=next_step)
        self._state = np.zeros((4, num_envs))
        self._step = np.zeros(num_envs, dtype=np.int64)

    def _begin(self, chosen: np.ndarray) -> None:
        self._state[:, chosen] = self._rng.uniform(-0.05, 0.05, (4, int(chosen.sum())))
        self._step[chosen] = 0

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gravity, cart, pole, half_length, force, tau = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
        x, x_dot, theta, theta_dot = self._state
        sin, cos = np.sin(theta), np.cos(theta)
        push = (np.where(action == 1, force, -force) + pole * half_length * theta_dot**2 * sin) / (cart + pole)
        theta_acc = (gravity * sin - cos * push) / (half_length * (4 / 3 - pole * cos**2 / (cart + pole)))
        x_acc = push - pole * half_length * theta_acc * cos / (cart + pole)
        self._state = np.stack(
            (x + tau * x_dot, x_dot + tau * x_acc, theta + tau * theta_dot, theta_dot + tau * theta_acc)
        )
        self._step += 1
        fallen = (np.abs(self._state[0]) > 2.4) | (np.abs(self._state[2]) > math.radians(12))
        return np.full(self.num_envs, REWARD, np.float32), fallen, ~fallen & (self._step >= self.length)

    def _observe(self) -> np.ndarray:
        return self._state[::2].T.astype(np.float32)


TASKS: dict[str, type[Task]] = {"repeat-previous": RepeatPrevious, "position-only-cartpole": PositionOnlyCartPole}
