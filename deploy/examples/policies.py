"""Two policies in one game: a seeker learns to find, a hider to get away, each with observations of its own."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
import pettingzoo
import shoal
import yaml
from gymnasium import spaces

PLACES = 7
"""Of a ring."""


class Ring(pettingzoo.ParallelEnv):
    """The seeker sees how far it is to the hider and moves up to two places; the hider moves one, and sees both."""

    metadata: ClassVar[dict[str, Any]] = {"name": "ring"}
    render_mode = None

    def __init__(self, steps: int = 16) -> None:
        self.possible_agents = ["seeker", "hider"]
        self.agents: list[str] = []
        self.steps = steps
        self.random = np.random.default_rng()

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """The distance as flags; for the hider the two places as flags."""
        return spaces.MultiBinary(PLACES if agent == "seeker" else 2 * PLACES)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """The places to move, from the lowest on."""
        return spaces.Discrete(5 if agent == "seeker" else 3)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Put both somewhere."""
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        self.at = {agent: int(self.random.integers(PLACES)) for agent in self.agents}
        return self._observe(), {agent: {} for agent in self.agents}

    def _observe(self) -> dict[str, np.ndarray]:
        places = np.eye(PLACES, dtype=np.int8)
        seeker, hider = self.at["seeker"], self.at["hider"]
        return {"seeker": places[(hider - seeker) % PLACES], "hider": np.concatenate([places[seeker], places[hider]])}

    def step(self, actions: dict[str, Any]) -> Any:
        """Move both; the seeker is rewarded where it has found the hider, which is rewarded elsewhere."""
        for agent, farthest in (("seeker", 2), ("hider", 1)):
            self.at[agent] = (self.at[agent] + int(actions[agent]) - farthest) % PLACES
        self.time += 1
        found = float(self.at["seeker"] == self.at["hider"])
        asked, over = list(self.agents), self.time == self.steps
        self.agents = [] if over else asked
        ended, cut = dict.fromkeys(asked, False), dict.fromkeys(asked, over)
        return self._observe(), {"seeker": found, "hider": 1.0 - found}, ended, cut, {agent: {} for agent in asked}


def main(**settings: Any) -> shoal.Run:
    """Train both, and tell what each got of the last games."""
    defaults: dict[str, Any] = {
        "env.id": "pettingzoo:policies:Ring",
        "env.num_envs": 32,
        "policies": {"seekers": {"agents": ["seeker"]}, "hiders": {"agents": ["hider"]}},
        "total_env_steps": 60_000,
    }
    run = shoal.train(config=defaults, **settings)
    for name, summary in run.summary["policies"].items():
        print(f"{name}: return {summary['mean_return']:.2f} of 16, policy version {summary['policy_version']}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
