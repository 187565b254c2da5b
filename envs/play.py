"""Playing an environment to the end of a number of episodes, whoever the player is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from envs.boundary import StepRows, VectorEnvironment
from envs.missions import MISSIONS

Player = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(obs [B, ...], is_first [B]) -> action [B, ...]."""


class Returns(NamedTuple):
    """Undiscounted returns of whole episodes."""

    mean: float
    """Per slot and episode; NaN where none ended."""
    standard_error: float
    """Of the mean, between the episodes of whole environments: the agents of one share a map and are no independent
    samples."""
    episodes: int
    """Of single slots."""
    mean_length: float
    """Steps per episode."""


def play(env: VectorEnvironment, player: Player, episodes: int, *, max_env_steps: int | None = None) -> Returns:
    """Play until every slot has finished its share of ``episodes``; what a slot finishes beyond is not counted.

    (Counting the first to finish would favour short episodes.) ``max_env_steps`` ends it early where episodes may not.
    """
    slots, spec = env.num_envs, env.spec
    share = -(-episodes // slots)
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.empty((slots, *spec.obs_shape), dtype=spec.obs_dtype)
    rows = StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2])
    rows.is_first[:] = True
    mission = MISSIONS.get(spec.env_id)
    agents = 1 if mission is None else mission.num_agents  # of one environment; they end together
    running = np.zeros(slots)
    length = np.zeros(slots, dtype=np.int64)
    finished = np.zeros(slots // agents, dtype=np.int64)
    returns: list[float] = []
    lengths: list[int] = []
    env.reset(obs)
    env_steps = 0
    while finished.min() < share and (max_env_steps is None or env_steps < max_env_steps):
        action = player(rows.obs, rows.is_first)
        full = ~env.short_episode
        env.step(action, rows)
        env_steps += slots
        running[rows.is_first] = 0.0
        length[rows.is_first] = -1
        running += rows.reward
        length += 1
        counts = ((rows.terminated | rows.truncated) & full)[::agents] & (finished < share)
        if counts.any():
            returns += running.reshape(-1, agents).mean(1)[counts].tolist()
            lengths += length[::agents][counts].tolist()
            finished += counts
    if not returns:
        return Returns(float("nan"), float("nan"), 0, float("nan"))
    error = float(np.std(returns, ddof=1)) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    return Returns(float(np.mean(returns)), error, len(returns) * agents, float(np.mean(lengths)))
