"""The common environments as gymnasium's vector environments, next-step: for RLlib, and by id for shoal."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
from environment import make_environment, spaces
from tasks import TASKS


class TaskVectorEnv(gymnasium.vector.VectorEnv):
    """``num_envs`` slots of a task."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012  (as gymnasium has it)

    def __init__(self, task: str, num_envs: int = 1, seed: int = 0, **kwargs: Any) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(task)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)
        self._name, self._seed = task, seed
        self._task = make_environment(task, num_envs, seed, next_step=True)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        if isinstance(seed, int) and seed != self._seed:
            self._seed = seed
            self._task = make_environment(self._name, self.num_envs, seed, next_step=True)
        return self._task.reset(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        return *self._task.step(np.asarray(actions)), {}


for name in ("images", *TASKS):
    gymnasium.register(f"{name}-v0", vector_entry_point=partial(TaskVectorEnv, name))
