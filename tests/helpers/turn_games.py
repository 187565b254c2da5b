"""A game in PettingZoo's API of turns: who takes the last stone wins."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from gymnasium import spaces

pettingzoo = pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")


class Nim(pettingzoo.AECEnv):  # type: ignore[misc, name-defined]
    """Each takes one to three of ``stones``; an illegal move loses. ``masks``: where they are, or ``none``."""

    metadata: ClassVar[dict[str, Any]] = {"name": "nim", "render_modes": ["rgb_array"], "render_fps": 10}
    illegal: ClassVar[list[str]] = []
    """Agents that took more than there was."""

    def __init__(
        self, stones: int = 5, masks: str = "obs", moves: str = "discrete", render_mode: str | None = None
    ) -> None:
        self.render_mode = render_mode
        self.possible_agents = ["first", "second"]
        self.masks, self.start = masks, stones
        self._action = spaces.Discrete(3) if moves == "discrete" else spaces.Box(0, 1, (1,), np.float32)
        seen: spaces.Space[Any] = spaces.Box(0, stones, (2,), np.float32)
        if masks == "obs":
            seen = spaces.Dict(observation=seen, action_mask=spaces.Box(0, 1, (3,), np.int8))
        self._observation = seen

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self._observation

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self._action

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        self.agents = list(self.possible_agents)
        self.agent_selection = "first"
        self.stones = self.start
        self._tell(dict.fromkeys(self.agents, 0.0))
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)

    def _tell(self, rewards: dict[str, float]) -> None:
        self.rewards = rewards
        self.infos = {agent: {"action_mask": self._mask()} if self.masks == "info" else {} for agent in self.agents}

    def _mask(self) -> np.ndarray:
        return (np.arange(1, 4) <= self.stones).astype(np.int8)

    def observe(self, agent: str) -> Any:
        seen = np.array([self.stones, agent == self.agent_selection], np.float32)
        # Who waits is told that nothing is legal, as in PettingZoo's own games.
        mask = self._mask() if agent == self.agent_selection else np.zeros(3, np.int8)
        return {"observation": seen, "action_mask": mask} if self.masks == "obs" else seen

    def render(self) -> Any:
        """The more stones are left, the brighter."""
        assert self.render_mode == "rgb_array"
        return np.full((16, 16, 3), 10 * self.stones, np.uint8)

    def step(self, action: int | None) -> None:
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        other = self.possible_agents[1 - self.possible_agents.index(agent)]
        assert action is not None
        legal = action + 1 <= self.stones
        if not legal:
            Nim.illegal.append(agent)
        self.stones = max(self.stones - int(action) - 1, 0)
        rewards = dict.fromkeys(self.agents, 0.0)
        if not self.stones:
            rewards = {agent: 1.0 if legal else -1.0, other: -1.0 if legal else 1.0}
            self.terminations = dict.fromkeys(self.agents, True)
        self.agent_selection = other
        self._tell(rewards)
