"""EnvPool's pools as gymnasium's vectors: ``env.id=envpool:TASK``, stepped in C++ by threads of its own."""

from __future__ import annotations

import difflib
import functools
import warnings
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from shoal.envs.config import EnvironmentNotFound

PREFIX = "envpool:"
"""What ids of its tasks begin with."""
_OF_THE_POOL = ("env_id", "players")
"""Parts of its infos that say where a row is from."""


def envpool_spec(env_id: str) -> EnvSpec:
    """Gymnasium's spec of a task, whose vectors are ``EnvPoolVector``.

    Raises:
        EnvironmentNotFound: EnvPool is not installed, or has no such task.
    """
    try:
        import envpool
    except ImportError as error:
        raise EnvironmentNotFound(f"environment {env_id!r} needs EnvPool ({error}): pip install envpool") from error
    task, known = env_id.removeprefix(PREFIX), envpool.list_all_envs()
    if task not in known:
        close = difflib.get_close_matches(task, known)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise EnvironmentNotFound(f"environment {env_id!r}: EnvPool has no task {task!r}{hint}")
    return EnvSpec(id=f"envpool/{task}", vector_entry_point=functools.partial(EnvPoolVector, task))


class EnvPoolVector(VectorEnv[Any, Any, Any]):
    """A pool that waits for all of its environments, in the mode NEXT_STEP: a step after an episode's end resets."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  (gymnasium's own form)

    def __init__(self, task: str, num_envs: int, **kwargs: Any) -> None:
        """Make a pool.

        Args:
            task: EnvPool's id, as ``Pong-v5``.
            num_envs: Slots.
            **kwargs: Further arguments of ``envpool.make``. A pool has one thread unless ``num_threads`` says
                otherwise: actors have a core each.

        Raises:
            TypeError: there is no such argument.
            ValueError: the pool would answer for other slots than those that were stepped.
        """
        import envpool

        if kwargs.get("batch_size", num_envs) != num_envs:
            raise ValueError(f"batch_size={kwargs['batch_size']}: all {num_envs} slots are stepped together")
        arguments = {"num_threads": 1, **kwargs, "num_envs": num_envs, "batch_size": num_envs}
        self._make = functools.partial(envpool.make, task, env_type="gymnasium", **arguments)
        self._pool = self._new_pool()
        self.num_envs = num_envs
        self.single_observation_space = self._pool.observation_space
        self.single_action_space = self._pool.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._slots = np.arange(num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every slot; with ``seed``, which a pool takes when it is made, in a new pool."""
        if seed is not None:
            self._pool.close()
            self._pool = self._new_pool(seed=seed)
        obs, info = self._pool.reset()
        return obs, self._infos(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every slot."""
        obs, reward, terminated, truncated, info = self._pool.step(np.asarray(actions))
        return obs, reward, terminated, truncated, self._infos(info)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the pool."""
        self._pool.close()

    def _new_pool(self, **seed: Any) -> Any:
        pool = self._make(**seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds in float64, which it gives to spaces of float32, once
            _ = pool.observation_space, pool.action_space
        return pool

    def _infos(self, info: dict[str, Any]) -> dict[str, Any]:
        if not np.array_equal(info["env_id"], self._slots):
            raise RuntimeError(f"EnvPool answered for the slots {info['env_id']}, in this order")
        return {name: value for name, value in info.items() if name not in _OF_THE_POOL}
