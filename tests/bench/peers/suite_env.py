"""What the adapters of ``shoal bench learn`` share: what they are asked, the environment, and who writes down its
episodes. The same for everybody, so that a curve does not depend on how its system counts.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

RECALL = "recall"


class Asked(NamedTuple):
    """The one argument of an adapter, in JSON."""

    env_id: str
    env_kwargs: dict[str, Any]
    env_steps: int
    seed: int
    settings: dict[str, Any]
    episodes: int
    """How many to play with the trained policy."""
    directory: str
    """Where what is played is written down."""

    @classmethod
    def of(cls, word: str) -> Asked:
        """Of the command line."""
        return cls(**json.loads(word))


class Recorded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Writes a file of its own below ``directory``: Unix seconds, environment steps so far, and how many episodes ended
    since the line before with what sum of returns. A line at an episode's end, and every ``EVERY`` steps."""

    EVERY = 25
    _numbers = itertools.count()

    def __init__(self, env: gymnasium.Env[Any, Any], directory: str) -> None:
        super().__init__(env)
        path = Path(directory, f"{os.getpid()}-{next(self._numbers)}")
        self._file = path.open("w", buffering=1)
        self._steps, self._return = 0, 0.0

    def reset(self, **kwargs: Any) -> Any:
        """As the environment."""
        if not self._steps:
            self._file.write(f"{time.time()} 0 0 0\n")
        self._return = 0.0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        """As the environment."""
        answer = self.env.step(action)
        self._steps += 1
        self._return += float(answer[1])
        ended = bool(answer[2] or answer[3])
        if ended or self._steps % self.EVERY == 0:
            self._file.write(f"{time.time()} {self._steps} {int(ended)} {self._return if ended else 0.0}\n")
        return answer


class Recall(gymnasium.Env[Any, Any]):
    """One slot of shoal's memory task."""

    def __init__(self) -> None:
        self._make(0)
        spec = self._slot.spec
        self.observation_space = gymnasium.spaces.Box(0, 1, spec.obs_shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(len(spec.actions.names[0]))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observation of an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._make(seed)
        if self._rows is None:
            self._begin()
        else:
            self._advance(0)  # the call after an end only resets
        return self._rows.obs[0].copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step."""
        rows = self._advance(int(action))
        return rows.obs[0].copy(), float(rows.reward[0]), bool(rows.terminated[0]), bool(rows.truncated[0]), {}

    def _make(self, seed: int) -> None:
        from shoal.envs.recall import RecallEnvironment

        self._slot, self._rows = RecallEnvironment(1, seed), None

    def _begin(self) -> None:
        from shoal.envs.boundary import StepRows

        kinds = (np.bool_, np.float32, np.bool_, np.bool_)
        self._rows = StepRows(np.zeros((1, *self._slot.spec.obs_shape), np.float32), *(np.zeros(1, k) for k in kinds))
        self._slot.reset(self._rows.obs)

    def _advance(self, action: int) -> Any:
        self._slot.step(np.array([action]), self._rows)
        return self._rows


def make(asked: Asked, *, wrapper: Mapping[str, Any], directory: str | None) -> gymnasium.Env[Any, Any]:
    """One environment: in ``wrapper``, a class by its dotted name with its arguments; recorded where there is a
    ``directory``."""
    env = Recall() if asked.env_id == RECALL else gymnasium.make(asked.env_id, **asked.env_kwargs)
    for name, kwargs in wrapper.items():
        module, _, attribute = name.rpartition(".")
        env = getattr(importlib.import_module(module), attribute)(env, **kwargs)
    return env if directory is None else Recorded(env, directory)


def tell(**found: Any) -> None:
    """The one line of JSON that the caller looks for."""
    sys.stdout.write("\n" + json.dumps(found) + "\n")
    sys.stdout.flush()
