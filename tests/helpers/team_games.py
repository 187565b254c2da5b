"""Games of two teams whose agents see and do different things, and whose best actions are known.

Every agent is shown a number, one of those of its actions, and is right where it names it: the hunters see a one-hot
code of 3, the runners a code of 4 numbers with two more beside it. One reward for each right action; games last
``steps``, which is an option of resets, too. Runner 0 leaves the game after half of them, so that the teams have
different numbers of valid steps, or both runners leave it after ``caught`` steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import shoal
from gymnasium import spaces

pettingzoo = pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")

HUNTERS, RUNNERS = ("hunter_0",), ("runner_0", "runner_1")
CODES = {"hunter": 3, "runner": 4}


class TeamGame(pettingzoo.ParallelEnv):  # type: ignore[misc, name-defined]  # importorskip's module is untyped
    """``poison`` is added to all that agents whose names begin with ``poisoned`` see."""

    metadata: ClassVar[dict[str, Any]] = {"name": "teams", "render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        steps: int = 8,
        poisoned: str = "",
        poison: float = 0.0,
        masked: bool = False,
        fails_at: int = 0,
        caught: int = 0,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.possible_agents = [*HUNTERS, *RUNNERS]
        self.agents: list[str] = []
        self.steps, self.poisoned, self.poison, self.masked, self.fails_at = steps, poisoned, poison, masked, fails_at
        self.caught = caught
        self.random = np.random.default_rng()
        self.time = self.total = 0
        self.shown: dict[str, int] = {}

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        count = CODES[kind(agent)]
        return spaces.Box(-100, 100, (count + 2 * (kind(agent) == "runner"),), np.float32)

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(CODES[kind(agent)])

    def _observe(self) -> dict[str, np.ndarray]:
        self.shown = {agent: int(self.random.integers(CODES[kind(agent)])) for agent in self.possible_agents}
        found = {}
        for agent in self.agents:
            found[agent] = np.zeros(self.observation_space(agent).shape, np.float32)
            found[agent][self.shown[agent]] = 1.0
            if self.poisoned and agent.startswith(self.poisoned):
                found[agent] += self.poison
        return found

    def _infos(self) -> dict[str, Any]:
        if not self.masked:
            return {agent: {} for agent in self.agents}
        # Nobody may name the number after the one that is shown.
        return {
            agent: {
                "action_mask": 1
                - np.eye(1, CODES[kind(agent)], (self.shown[agent] + 1) % CODES[kind(agent)], dtype=np.int8)[0]
            }
            for agent in self.agents
        }

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.steps = (options or {}).get("steps", self.steps)
        self.time, self.agents = 0, list(self.possible_agents)
        return self._observe(), self._infos()

    def render(self) -> Any:
        """Every pixel of the picture after step t is 20 t."""
        assert self.render_mode == "rgb_array"
        return np.full((16, 16, 3), 20 * self.time, np.uint8)

    def step(self, actions: dict[str, Any]) -> Any:
        assert set(actions) == set(self.agents)
        self.total += 1
        if self.fails_at and self.total == self.fails_at:
            raise OSError("the board fell off the table")
        self.time += 1
        asked = list(self.agents)
        reward = {agent: float(int(actions[agent]) == self.shown[agent]) for agent in asked}
        if self.masked:
            for agent in asked:
                assert int(actions[agent]) != (self.shown[agent] + 1) % CODES[kind(agent)]
        last = {"runner_0": self.caught or self.steps // 2, "runner_1": self.caught or self.steps}
        left = {agent: self.time >= last.get(agent, self.steps) for agent in asked}
        obs, infos = self._observe(), self._infos()
        self.agents = [agent for agent in asked if not left[agent]]
        return obs, reward, left, dict.fromkeys(asked, False), infos


class UntilEvaluated(shoal.Callback):
    """Ends a run once each of two policies was evaluated."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def on_evaluation(self, run: Any, result: Any) -> dict[str, float]:
        self.told.add(result.policy)
        if len(self.told) == 2:
            run.stop()
        return {"evaluated": result.mean_return}


def kind(agent: str) -> str:
    """``hunter`` or ``runner``."""
    return agent.partition("_")[0]


def teams(**kwargs: Any) -> TeamGame:
    return TeamGame(**kwargs)


def best_return(agent: str, steps: int = 8) -> float:
    """The return of an agent that is always right."""
    return float(steps // 2 if agent == "runner_0" else steps)
