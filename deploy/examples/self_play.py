"""Self-play: a policy learns a game of turns against frozen versions of itself."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
import pettingzoo
import shoal
import yaml
from gymnasium import spaces


class Nim(pettingzoo.AECEnv):
    """Each in turn takes one to three of ``stones``. Who takes the last one wins, so who leaves a multiple of four."""

    metadata: ClassVar[dict[str, Any]] = {"name": "nim"}
    render_mode = None

    def __init__(self, stones: int = 10) -> None:
        super().__init__()
        self.possible_agents = ["first", "second"]
        self.most = stones

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The stones that are left as flags, and which moves are legal."""
        flags, moves = spaces.MultiBinary(self.most + 1), spaces.MultiBinary(3)
        return spaces.Dict(observation=flags, action_mask=moves)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """Take one, two or three."""
        return spaces.Discrete(3)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Begin with all stones."""
        self.agents, self.agent_selection, self.stones = list(self.possible_agents), "first", self.most
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos: dict[str, dict[str, Any]] = {agent: {} for agent in self.agents}

    def observe(self, agent: str) -> dict[str, Any]:
        """As a player sees it whose turn it is."""
        return see(self.stones, self.most)

    def step(self, action: Any) -> None:
        """Take stones, and pass the turn on."""
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        self.stones -= int(action) + 1
        self.agent_selection = other = self.agents[1 - self.agents.index(agent)]
        self._cumulative_rewards[agent] = 0.0
        self.rewards = {agent: 0.0, other: 0.0}
        if self.stones == 0:
            self.rewards = {agent: 1.0, other: -1.0}
            self.terminations = dict.fromkeys(self.agents, True)
        self._accumulate_rewards()


def see(stones: int, most: int) -> dict[str, Any]:
    """The observation of a player who may take from so many stones."""
    flags = np.zeros(most + 1, np.int8)
    flags[stones] = 1
    return {"observation": flags, "action_mask": (np.arange(1, 4) <= stones).astype(np.int8)}


def main(**settings: Any) -> shoal.Run:
    """Train, and count the positions in which the policy leaves a multiple of four where it can."""
    defaults: dict[str, Any] = {
        "env.id": "pettingzoo:self_play:Nim",
        "self_play": {"share": 1, "every_updates": 10, "draw": "results"},
        "actor.unroll_length": 16,
        "env.num_envs": 32,
        "total_env_steps": 40_000,
    }
    run = shoal.train(config=defaults, **settings)
    for result in run.summary["self_play"]:
        if result["games"]:
            print(f"won {result['win_share']:.0%} of the games against version {result['policy_version']}")
    policy = shoal.load_policy(run.run_dir, greedy=True)
    won = [stones for stones in range(1, 11) if stones % 4]
    right = sum(int(policy.act(see(stones, 10), is_first=True)) + 1 == stones % 4 for stones in won)
    print(f"the right move in {right} of {len(won)} positions that can be won")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
