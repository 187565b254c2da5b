"""The agents of several policies, played as those of one environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from shoal.envs.boundary import DiscreteActions, EnvSpec, StepRows, VectorSpace
from shoal.envs.play import Player
from shoal.envs.reports import Reports
from shoal.envs.teams import TeamsEnvironment


class AllAgents:
    """The agents of all policies as one ``VectorEnvironment`` for ``envs.play``, which asks ``act`` for their actions.

    ``players`` has one for each policy. A row of ``obs`` is what its agent sees, flat, with zeros behind it; what is
    given to ``step`` means nothing.
    """

    def __init__(self, teams: TeamsEnvironment, players: Sequence[Player]) -> None:
        self._games, self._players = teams.games, players
        groups = self._games.groups
        self.num_envs = self._games.num_slots
        widest = max(group.obs[0].size for group in groups)
        self.spec = EnvSpec(
            env_id=groups[0].spec.env_id,
            observation=VectorSpace(size=widest),
            actions=DiscreteActions(names=(("",),)),
            num_agents=sum(group.spec.num_agents for group in groups),
        )
        self.short_episode = np.zeros(self.num_envs, np.bool_)
        self.reports = Reports()
        self._actions: list[np.ndarray] = []

    @property
    def faults(self) -> list[str]:
        """Messages of the games."""
        return self._games.faults

    @faults.setter
    def faults(self, messages: list[str]) -> None:
        self._games.faults = messages

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot."""
        self._games.reset()
        self._show(obs)

    def act(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Choose the actions of every policy's agents."""
        self._actions = [
            player(group.obs, is_first[group.slots], *((group.action_mask,) if group.spec.num_mask else ()))
            for player, group in zip(self._players, self._games.groups, strict=True)
        ]
        return np.zeros(self.num_envs, np.int64)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Step the games with the actions that ``act`` has chosen."""
        self._games.step(self._actions)
        self._games.flags.copy_to(rows, slice(None))
        self._show(rows.obs)
        for group in self._games.groups:
            if group.reports:
                told = group.reports.take()
                episodes = [(int(group.slots[row]), numbers) for row, numbers in told.episodes]
                self.reports.add(Reports(told.counts, told.examples, episodes), 0)

    def _show(self, obs: np.ndarray) -> None:
        obs.fill(0)
        for group in self._games.groups:
            flat = group.obs.reshape(len(group.slots), -1)
            obs[group.slots, : flat.shape[1]] = flat

    def first_environment(self) -> Any:
        """The first game."""
        return self._games.all[0].inner.env

    def close(self) -> None:
        """Close the games."""
        self._games.close()
