"""Playing an environment to the end of a number of episodes, whoever the player is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from envs.boundary import StepRows, VectorEnvironment

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
    """Play until every environment has finished its share of ``episodes``; what it finishes beyond is not counted.

    (Counting the first to finish would favour short episodes.) Where agents share an environment
    (``EnvSpec.num_agents``), their episodes count together, when the last of them has ended. ``max_env_steps`` ends it
    early where episodes may not.
    """
    slots, spec = env.num_envs, env.spec
    share = -(-episodes // slots)
    flags = [np.zeros(slots, dtype=bool) for _ in range(3)]
    obs = np.empty((slots, *spec.obs_shape), dtype=spec.obs_dtype)
    final_obs = np.empty_like(obs) if spec.same_step else None
    rows = StepRows(obs, flags[0], np.zeros(slots, dtype=np.float32), flags[1], flags[2], final_obs)
    rows.is_first[:] = True
    agents = spec.num_agents
    tally = _Tally(slots, agents)
    finished = np.zeros(slots // agents, dtype=np.int64)
    returns: list[float] = []
    num_episodes = num_steps = 0
    env.reset(obs)
    env_steps = 0
    while finished.min() < share and (max_env_steps is None or env_steps < max_env_steps):
        action = player(rows.obs, rows.is_first)
        full = ~env.short_episode
        env.step(action, rows)
        env_steps += slots
        over = tally.add(rows, full)
        counts = over & (tally.episodes > 0) & (finished < share)
        if counts.any():
            returns += (tally.returns[counts] / tally.episodes[counts]).tolist()
            num_episodes += int(tally.episodes[counts].sum())
            num_steps += int(tally.lengths[counts].sum())
            finished += counts
        tally.clear(over)
    if not returns:
        return Returns(float("nan"), float("nan"), 0, float("nan"))
    error = float(np.std(returns, ddof=1)) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    return Returns(float(np.mean(returns)), error, num_episodes, num_steps / num_episodes)


class _Tally:
    """Sums over the episodes of agents who share an environment [B / agents], until all of them have ended."""

    def __init__(self, slots: int, agents: int) -> None:
        self._agents = agents
        self._return = np.zeros(slots)
        self._length = np.zeros(slots, dtype=np.int64)
        self.returns = np.zeros(slots // agents)
        self.lengths = np.zeros(slots // agents, dtype=np.int64)
        self.episodes = np.zeros(slots // agents, dtype=np.int64)

    def add(self, rows: StepRows, full: np.ndarray) -> np.ndarray:
        """Count a step; bool [B / agents]: where the last agent's episode has ended. ``full`` bool [B]: which episodes
        count.
        """
        ended = rows.terminated | rows.truncated
        void = rows.is_first & ~ended
        self._return += rows.reward
        self._length += 1
        self._return[void] = 0.0
        self._length[void] = 0
        if not (ended.any() or void.any()):
            return np.zeros(len(self.episodes), dtype=bool)
        counted = ended & full
        self.returns += self._of_environments(np.where(counted, self._return, 0.0)).sum(1)
        self.lengths += self._of_environments(np.where(counted, self._length, 0)).sum(1)
        self.episodes += self._of_environments(counted).sum(1)
        self._return[ended] = 0.0
        self._length[ended] = 0
        # What agents finished before a fault restarted their environment is not joined to the episodes after it.
        self.clear(np.asarray(self._of_environments(void).all(1)))
        return np.asarray(self._of_environments(ended).any(1) & self._of_environments(ended | void).all(1))

    def clear(self, over: np.ndarray) -> None:
        """Begin the environments' next episodes."""
        for total in (self.returns, self.lengths, self.episodes):
            total[over] = 0

    def _of_environments(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, self._agents)
