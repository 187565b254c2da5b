"""Games whose agents are divided among several policies, each of which sees its own agents alone.

``TeamsEnvironment`` plays the games; each of its ``Team`` is a ``VectorEnvironment`` of one policy's agents, whose
spaces may be others than those of the rest. All teams act, then the games are stepped once.
"""

# B rows of one team, G games

from __future__ import annotations

import fnmatch
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from shoal.envs.boundary import StepRows
from shoal.envs.config import AdapterOptions
from shoal.envs.games import Games, Group
from shoal.envs.pettingzoo import GroupSpec, make_games, make_group_specs
from shoal.envs.reports import Reports
from shoal.problems import Problems

Patterns = Mapping[str, Sequence[str]]
"""Patterns of agents' names, as of ``fnmatch``, by the name of the policy that plays them."""


def divide_agents(patterns: Patterns, env_id: str, agents: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """The indices of every policy's agents among ``agents``, the ``possible_agents`` of a game.

    Raises:
        ValueError: an agent belongs to no policy or to several, or a policy has none.
    """
    names = [str(agent) for agent in agents]
    owners = [
        [policy for policy, own in patterns.items() if any(fnmatch.fnmatchcase(name, each) for each in own)]
        for name in names
    ]
    problems = []
    for name, own in zip(names, owners, strict=True):
        if len(own) > 1:
            problems.append(
                f"policies: agent {name} of {env_id} belongs to {' and '.join(own)}; every agent belongs to one "
                "policy, so narrow their agents"
            )
    for policy, wanted in patterns.items():
        if not any(policy in found for found in owners):
            problems.append(
                f"policies.{policy}.agents: no agent of {env_id} is named {' or '.join(wanted)}; its agents are "
                f"{_list(names)}"
            )
    lost = [name for name, own in zip(names, owners, strict=True) if not own]
    if lost and not problems:  # they may be those that a policy without agents was meant for
        problems.append(
            f"policies: {_list(lost)} of {env_id} {'belongs' if len(lost) == 1 else 'belong'} to no policy; name "
            f"{'it' if len(lost) == 1 else 'them'} in policies.NAME.agents (patterns such as agent_* may do)"
        )
    if problems:
        raise Problems(*problems)
    return {policy: tuple(index for index, own in enumerate(owners) if own == [policy]) for policy in patterns}


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def make_team_specs(
    env_id: str, options: AdapterOptions, kwargs: Mapping[str, Any], patterns: Patterns
) -> dict[str, GroupSpec]:
    """The agents of every policy, with the spec of one agent's slot.

    Raises:
        ValueError: as ``divide_agents``; the environment is not PettingZoo's; or as ``envs.pettingzoo``.
    """
    if not env_id.startswith("pettingzoo:"):
        raise ValueError(
            f"policies: {env_id} does not name its agents; several policies are trained in environments of PettingZoo "
            "(pettingzoo:package.module:factory)"
        )
    return make_group_specs(env_id, options, kwargs, functools.partial(divide_agents, patterns))


class TeamsEnvironment:
    """The games of one actor, and their ``teams`` by the name of the policy.

    Each team must be reset once, then give its actions and take its rows, one after the other, as often as it likes.

    Args:
        env_id: ``pettingzoo:package.module:factory``.
        num_envs: slots of all teams together.
        seed: as of ``envs.pettingzoo``.
        options: as of ``envs.pettingzoo``.
        whole_episodes: every episode has a seed of its own, as in evaluation.
        kwargs: arguments of the factory.
        patterns: whose agents are whose.

    Raises:
        ValueError: as ``make_team_specs``, or ``num_envs`` does not fit.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        options: AdapterOptions,
        whole_episodes: bool,
        kwargs: Mapping[str, Any],
        patterns: Patterns,
    ) -> None:
        divide = functools.partial(divide_agents, patterns)
        if isinstance(seed, np.random.SeedSequence):
            # Spawning from the caller's own would give the next environment made with it other children.
            seed = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key, pool_size=seed.pool_size)
        self.games: Games = make_games(env_id, num_envs, seed, options, whole_episodes, kwargs, divide)
        self.teams = {
            policy: Team(self, group, leads=number == 0)
            for number, (policy, group) in enumerate(zip(patterns, self.games.groups, strict=True))
        }
        self.steps = 0
        """Times that the games were stepped."""
        self._num_envs = num_envs
        self._begun = self._closed = False
        self._options: dict[str, Any] | None = None
        if options.reset_options:
            self.set_options(dict(options.reset_options))

    def begin(self) -> None:
        """Reset the games, unless another team asked for it."""
        if not self._begun:
            self.games.reset()
            self._begun = True

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later games, once for all teams; games that nobody has played begin anew."""
        if options != self._options:
            self._options = options
            self.games.set_options(options)
            self._begun = self._begun and self.steps > 0

    def play(self, caller: Team) -> None:
        """Step the games with the actions of all teams; their time is every team's by its slots, not the caller's.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        actions = [team.chosen for team in self.teams.values()]
        if any(action is None for action in actions):
            raise RuntimeError("the games were to be stepped before every team had acted")
        for team in self.teams.values():
            team.chosen = None
        begun = time.perf_counter()
        self.games.step([action for action in actions if action is not None])
        seconds = time.perf_counter() - begun
        caller.owed_seconds -= seconds
        for team in self.teams.values():
            team.owed_seconds += seconds * team.num_envs / self._num_envs
        self.steps += 1

    def close(self) -> None:
        """Close the games, once."""
        if not self._closed:
            self._closed = True
            self.games.close()


class Team:
    """The agents of one policy in all games, as a ``SharedEnvironment``, and a ``GroupedEnvironment`` of one group.

    Row ``g * num_agents + a`` is the ``a``-th of its agents in game g. The first team to take its rows steps the games.
    """

    def __init__(self, whole: TeamsEnvironment, group: Group, *, leads: bool) -> None:
        self._whole, self._group, self._leads = whole, group, leads
        self.spec, self.num_envs = group.spec, len(group.slots)
        self.slots = slice(0, self.num_envs)
        self.groups = (self,)
        self.short_episode = np.zeros(self.num_envs, np.bool_)
        self.action_mask = group.action_mask
        self.reports: Reports = group.reports
        self.chosen: np.ndarray | None = None
        """The actions [B, ...] that the games are stepped with next."""
        self.owed_seconds = 0.0
        """Since ``take_owed_seconds``."""
        self._taken = 0
        """Steps whose rows were taken."""
        self._none: list[str] = []

    @property
    def faults(self) -> list[str]:
        """Messages of the games; one team has those of all, so that they are told once."""
        return self._whole.games.faults if self._leads else self._none

    @faults.setter
    def faults(self, messages: list[str]) -> None:
        if self._leads:
            self._whole.games.faults = messages
        else:
            self._none = messages

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot of all teams and write the team's first observations into ``obs``."""
        self._whole.begin()
        obs[:] = self._group.obs

    def step_begin(self, action: np.ndarray) -> None:
        """Give the team's actions [B, *action_shape]; ``step_end`` must follow once every team has given its own."""
        self.chosen = action

    def step_end(self, rows: StepRows) -> None:
        """Fill ``rows`` with what the step led to.

        Raises:
            EnvironmentFault: a game failed several times in a row.
        """
        if self._taken == self._whole.steps:
            self._whole.play(self)
        self._taken += 1
        rows.obs[:] = self._group.obs
        self._whole.games.flags.copy_to(rows, self._group.slots)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Both, where no other team is left to act."""
        self.step_begin(action)
        self.step_end(rows)

    def take_owed_seconds(self) -> float:
        """As in ``envs.boundary.SharedEnvironment``."""
        owed, self.owed_seconds = self.owed_seconds, 0.0
        return owed

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later games, as in ``envs.boundary.OptionsEnvironment``."""
        self._whole.set_options(options)

    def close(self) -> None:
        """Close the games of all teams."""
        self._whole.close()
