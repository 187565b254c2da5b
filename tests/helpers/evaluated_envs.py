"""Environments for tests of evaluation; worker processes import this module too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces


class Wandering(gymnasium.Env[np.ndarray, int]):
    """Every action draws as many numbers as it says: what later episodes begin with depends on what was done."""

    mood: ClassVar[Exception | None] = None
    """Raised where one is made."""
    observation_space = spaces.Box(0, 2, (1,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self) -> None:
        if self.mood:
            raise self.mood

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.random()), 0
        return np.array([self.place], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.np_random.random(int(action))
        self.steps += 1
        seen = np.array([self.place + 0.01 * action], np.float32)
        return seen, self.place + 0.01 * action, self.steps == 4, False, {}


class Painted(gymnasium.Env[np.ndarray, int]):
    """Episode k has 3 + k % 2 steps; its picture gets brighter by 50 with every step. Of odd size.

    Where it is ``masked``, one action is legal, and the other one a fault.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}
    observation_space = spaces.Box(0, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, broken: bool = False, masked: bool = False) -> None:
        self.render_mode, self.broken, self.masked = render_mode, broken, masked
        self.episode, self.steps = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return np.zeros(1, np.float32), self._info()

    def _info(self) -> dict[str, Any]:
        return {"action_mask": np.arange(2) == self.steps % 2} if self.masked else {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.masked and action != self.steps % 2:
            raise ValueError("that action was not legal")
        self.steps += 1
        return np.full(1, self.steps, np.float32), 1.0, self.steps == 3 + self.episode % 2, False, self._info()

    def render(self) -> Any:
        if self.broken:
            raise gymnasium.error.DependencyNotInstalled("pip install gymnasium[classic-control]")
        assert self.render_mode == "rgb_array"
        return np.full((33, 65, 3), 50 * self.steps, np.uint8)


class Fragile(gymnasium.Env[np.ndarray, int]):
    """Sound where the run trains; elsewhere its third step breaks in the way ``how``. ``marker`` is a directory that
    gets a file named by the process that does.
    """

    observation_space = spaces.Box(0, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, how: str = "", marker: str = "", everywhere: bool = False) -> None:
        self.how, self.marker, self.everywhere, self.total = how, marker, everywhere, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps, self.total = self.steps + 1, self.total + 1
        if self.total >= 3 and (self.everywhere or multiprocessing.parent_process() is not None):
            if self.marker:
                Path(self.marker, str(os.getpid())).touch()
            match self.how:
                case "raises":
                    raise RuntimeError("only when evaluated")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(3600)
        return np.full(1, self.steps, np.float32), float(action), self.steps == 4, False, {}


gymnasium.register("Wandering-v0", "evaluated_envs:Wandering")
gymnasium.register("Painted-v0", "evaluated_envs:Painted")
gymnasium.register("Fragile-v0", "evaluated_envs:Fragile")
