"""A game of several agents in PettingZoo's parallel API, each of whom plays a script."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from gymnasium import spaces
from scripted_envs import NUM_ACTIONS, SPACES, Script, observe

pettingzoo = pytest.importorskip("pettingzoo", reason="needs shoal[pettingzoo]")


class ScriptedGame(pettingzoo.ParallelEnv):  # type: ignore[misc, name-defined]  # importorskip's module is untyped
    """A script for every agent, of the seed where there is no ``salt``.

    Those in ``late`` join in the game's third step, if anyone still plays. ``together`` ends all with the first of
    them. From its ``at``-th step on it breaks in the way ``how``.
    """

    instances: ClassVar[list[ScriptedGame]] = []

    metadata: ClassVar[dict[str, Any]] = {"name": "scripted"}
    render_mode = None

    def __init__(
        self,
        num_agents: int = 3,
        salt: int | None = 0,
        late: tuple[int, ...] = (),
        together: bool = False,
        how: str = "",
        at: int = 0,
        spaces_differ: bool = False,
    ) -> None:
        self.possible_agents = [f"agent_{index}" for index in range(num_agents)]
        self.agents: list[str] = []
        self.late, self.together, self.how, self.at = late, together, how, at
        self.spaces_differ = spaces_differ
        self.salt = salt
        self.scripts = {agent: Script(salt or 0) for agent in self.possible_agents}
        self.total = self.step_ = 0
        self.asked: list[set[str]] = []
        """The agents that had to act, by step."""
        self.ended: set[str] = set()
        self.closed = False
        ScriptedGame.instances.append(self)

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        differs = self.spaces_differ and agent == self.possible_agents[-1]
        return spaces.Box(0, 9, (2,), np.float32) if differs else SPACES["box"]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(NUM_ACTIONS)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self.how == "reset":
            raise OSError("no map")
        if self.salt is None and seed is not None:
            self.scripts = {agent: Script(seed + index) for index, agent in enumerate(self.possible_agents)}
        self.step_ = 0
        self.ended = set()
        late = {self.possible_agents[index] for index in self.late}
        self.agents = [agent for agent in self.possible_agents if agent not in late]
        return {agent: observe("box", self.scripts[agent].reset()) for agent in self.agents}, {}

    def step(self, actions: dict[str, int]) -> Any:
        self.total, self.step_ = self.total + 1, self.step_ + 1
        if self.how == "lists the ended":
            self.agents = [agent for agent in self.agents if agent not in self.ended]
        assert set(actions) == set(self.agents)
        self.asked.append(set(actions))
        answers = {agent: self.scripts[agent].step(int(actions[agent])) for agent in self.agents}
        over = self.together and any(answer[2] or answer[3] for answer in answers.values())
        obs = {agent: observe("box", answer[0]) for agent, answer in answers.items()}
        reward = {agent: answer[1] for agent, answer in answers.items()}
        terminated = {agent: answer[2] for agent, answer in answers.items()}
        truncated = {agent: answer[3] or (over and not answer[2]) for agent, answer in answers.items()}
        self.ended |= {agent for agent in self.agents if terminated[agent] or truncated[agent]}
        self.agents = [agent for agent in self.agents if agent not in self.ended]
        if self.how == "revives" and self.agents:
            # An agent that was out of the game in this step is back after it.
            for agent in sorted(self.ended - set(answers)):
                self.agents.append(agent)
                self.ended.remove(agent)
                obs[agent] = observe("box", self.scripts[agent].reset())
        if self.agents and self.step_ == 3:
            for index in self.late:
                agent = self.possible_agents[index]
                self.agents.append(agent)
                obs[agent] = observe("box", self.scripts[agent].reset())
        if self.how and self.total >= self.at and self.agents:
            agent = self.agents[-1]
            match self.how:
                case "raises":
                    raise RuntimeError("100% lost")
                case "no obs":
                    del obs[agent]
                case "obs nan":
                    obs[agent] = np.full(3, np.nan, np.float32)
                case "reward nan":
                    reward[agent] = float("nan")
                case "no reward":
                    del reward[agent]
                case "terminated two":
                    terminated[agent] = 2  # type: ignore[assignment]  # the fault
                case "gone":
                    self.agents.remove(agent)
                case "stranger":
                    self.agents.append("stranger")
                case "keeps last rows":
                    for gone in self.ended - set(self.agents):
                        if terminated.get(gone):
                            del obs[gone]
                case "lists the ended":
                    self.agents = list(self.possible_agents)
                    obs = {agent: observe("box", self.scripts[agent].state) for agent in self.agents}
        return obs, reward, terminated, truncated, {agent: {} for agent in obs}

    def close(self) -> None:
        self.closed = True


def parallel_env(**kwargs: Any) -> ScriptedGame:
    return ScriptedGame(**kwargs)


def not_a_game() -> pettingzoo.ParallelEnv:  # type: ignore[name-defined]
    return object()


class PaintedGame(ScriptedGame):
    """With pictures: every pixel of the picture after step t is 10 t."""

    metadata: ClassVar[dict[str, Any]] = {"name": "painted", "render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.render_mode = render_mode

    def render(self) -> Any:
        assert self.render_mode == "rgb_array"
        return np.full((16, 16, 3), 10 * self.step_, np.uint8)


def painted_game(render_mode: str | None = None) -> PaintedGame:
    return PaintedGame(render_mode, salt=3)
