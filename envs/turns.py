"""PettingZoo's games in which agents take turns, as games in which all act at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils import BaseParallelWrapper, turn_based_aec_to_parallel
from shoal.envs.masks import KEY


def taking_turns(env: AECEnv) -> ParallelEnv:
    """A game of one step for each turn.

    All agents observe every turn, and have rewards when they come. An agent whose turn it is not has one legal action,
    the first, which the game does not see: so it has no choice, and neither the policy gradient nor the entropy bonus
    counts it.

    Raises:
        ValueError: an agent's actions cannot be masked.
    """
    for agent in env.possible_agents:
        if not isinstance(space := env.action_space(agent), spaces.Discrete):
            raise ValueError(
                f"agents take turns, and agent {agent!r} has the actions {space}; expected Discrete: an agent that "
                "waits is given a mask of one action"
            )
    return _Masked(turn_based_aec_to_parallel(env))


class _Masked(BaseParallelWrapper):
    """A game with a mask for every agent: its own, all actions, or, while others have the turn, the first one."""

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        obs, infos = super().reset(seed=seed, options=options)
        return self._mask(obs, infos)

    def step(self, actions: dict[Any, Any]) -> tuple[Any, Any, Any, Any, Any]:
        obs, *rest, infos = super().step(actions)
        obs, infos = self._mask(obs, infos)
        rewards, terminated, truncated = rest
        return obs, rewards, terminated, truncated, infos

    def _mask(self, obs: dict[Any, Any], infos: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        acts = self.env.aec_env.agent_selection if self.env.agents else None
        seen, told = {}, {}
        for agent, observed in obs.items():
            count = int(self.env.action_space(agent).n)
            info = dict(infos.get(agent, {}))
            in_obs = isinstance(observed, Mapping) and KEY in observed
            given = observed[KEY] if in_obs else info.get(KEY)
            if agent != acts:
                given = np.eye(1, count, dtype=np.int8)[0]
            elif given is None:
                given = np.ones(count, dtype=np.int8)
            if in_obs:
                observed = {**observed, KEY: given}
            else:
                info[KEY] = given
            seen[agent], told[agent] = observed, info
        return seen, told
