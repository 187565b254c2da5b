"""The scripted environment in every vectorization, the rows that it answers into, and the processes that it runs in."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from make_env import make_env
from shoal.envs.boundary import StepRows, VectorEnvironment
from shoal.envs.gym import GymEnvironment

ID = "scripted_envs:ScriptedLog-v0"
MODES = [mode.name.lower() for mode in AutoresetMode]
SLOTS = 3


def make(vectorization: str, mode: str, slots: int = SLOTS, **kwargs: Any) -> VectorEnvironment:
    """The scripted environment; only the single one is told its mode by us."""
    name = {"mode": mode.upper()} if vectorization == "native" else {"autoreset_mode": mode}
    return make_env(ID, slots, 0, vectorization=vectorization, **name, **kwargs)


class Rows:
    """An environment's answers, in strided buffers like the rollout worker's, full of values that must not stay."""

    def __init__(self, env: VectorEnvironment) -> None:
        shape, dtype = (env.num_envs, 2, *env.spec.obs_shape), env.spec.obs_dtype
        flags = np.ones((env.num_envs, 2, 3), bool)
        self.rows = StepRows(
            np.full(shape, 77, dtype)[:, 1],
            flags[:, 1, 0],
            np.full((env.num_envs, 2), np.nan, np.float32)[:, 1],
            flags[:, 1, 1],
            flags[:, 1, 2],
            np.full(shape, 77, dtype)[:, 1] if env.spec.same_step else None,
        )


@contextlib.contextmanager
def environment(slots: int = 2, *, vectorization: str = "async", **kwargs: Any) -> Iterator[GymEnvironment]:
    """An environment, and after it no process of it."""
    env = make_env(ID, slots, 0, vectorization=vectorization, **kwargs)
    assert isinstance(env, GymEnvironment)
    processes: list[int] = []
    try:
        yield env
        processes = process_ids(env)
    finally:
        env.close()
    assert multiprocessing.active_children() == []
    assert not any(is_alive(process) for process in processes)


def process_ids(env: GymEnvironment) -> list[int]:
    return [process.pid for process in getattr(env._vector, "processes", [])]


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, 0)
            return not Path("/proc/self").exists()
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def step(env: GymEnvironment, rows: Any, count: int = 1) -> None:
    for _ in range(count):
        env.step(np.zeros(env.num_envs, int), rows)
