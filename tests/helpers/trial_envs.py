"""Environments whose episodes belong to trials, which their observations tell: ``trial_envs:Trials-v0`` and others.

An observation is (1, instance, trial, episode, step, noise), so that who reads it knows where trials begin, whatever
adapters and infos say.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

KEY = "trial"
OBSERVATION = spaces.Box(-100, 100, (6,), np.float32)
_instances = itertools.count(1)


class Trial:
    """Trials of one to three episodes of one to five steps. ``tells`` says which infos have a flag: ``ends``: the last
    step of every episode, true in the trial's last; ``begins``: the reset that begins a trial; ``nothing``: none. In
    mid-episode it is always true, which means nothing."""

    def __init__(self, tells: str) -> None:
        self.tells, self.instance = tells, next(_instances)
        self.trial, self.episode, self.left, self.steps = 0, 0, 0, 0

    def reset(self, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        begins = not self.left
        if begins:
            self.trial, self.left = self.trial + 1, int(rng.integers(1, 4))
        self.left -= 1
        self.episode, self.steps, self.length = self.episode + 1, 0, int(rng.integers(1, 6))
        return self.obs(rng), {KEY: True} if begins and self.tells == "begins" else {}

    def step(self, rng: np.random.Generator) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        ended, kind = self.steps == self.length, bool(rng.integers(2))
        info: dict[str, Any] = {} if self.tells == "nothing" else {KEY: True}
        if ended:
            info = {KEY: not self.left} if self.tells == "ends" else {}
        return self.obs(rng), float(rng.normal()), ended and kind, ended and not kind, info

    def obs(self, rng: np.random.Generator) -> np.ndarray:
        told = (self.instance, self.trial, self.episode, self.steps)
        return np.array([1, *(number / 10 for number in told), rng.normal()], np.float32)


def places(obs: np.ndarray) -> list[tuple[int, ...] | None]:
    """(instance, trial, episode) of observations [T, 6]; None for rows of an agent that is out of the game."""
    return [tuple(np.rint(row[1:4] * 10).astype(int).tolist()) if row[0] else None for row in obs]


class Trials(gymnasium.Env[Any, Any]):
    """The trials of one slot; ``fails_at``: the step in which every instance fails."""

    observation_space, action_space = OBSERVATION, spaces.Discrete(3)

    def __init__(self, tells: str = "ends", fails_at: int = 0) -> None:
        self.script, self.fails_at, self.total = Trial(tells), fails_at, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.script.reset(self.np_random)

    def step(self, action: Any) -> Any:
        self.total += 1
        if self.total == self.fails_at:
            raise RuntimeError("broken on purpose")
        return self.script.step(self.np_random)

    def get_state(self) -> Any:
        return vars(self.script) | {"total": self.total}

    def set_state(self, state: Any) -> None:
        self.total = state.pop("total")
        vars(self.script).update(state)


class Bandit(gymnasium.Env[Any, Any]):
    """Trials of ``pulls`` episodes, each a pull of one of two arms, of which one pays 1 in the whole trial. What a pull
    paid shows in the episode's last observation alone, so memory of one episode earns 0.5, and memory of the trial
    1 from the second pull on. ``info["trial_ended"]`` tells of the trial's last."""

    observation_space, action_space = spaces.Box(0, 1, (5,), np.float32), spaces.Discrete(2)

    def __init__(self, pulls: int = 6) -> None:
        self.pulls, self.left, self.arm = pulls, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        if not self.left:
            self.arm, self.left = int(self.np_random.integers(2)), self.pulls
        return np.array([1, 0, 0, 0, 0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        paid = int(action == self.arm)
        obs = np.zeros(5, np.float32)
        obs[1 + 2 * int(action) + paid] = 1
        return obs, float(paid), True, False, {"trial_ended": not self.left}


class NativeTrials(VectorEnv[Any, Any, Any]):
    """The same, stepped all slots at once; ``final_info`` says whether infos of last steps are apart in SAME_STEP."""

    def __init__(
        self, num_envs: int = 1, tells: str = "ends", mode: str = "NEXT_STEP", final_info: bool = True
    ) -> None:
        self.num_envs, self.mode, self.final_info = num_envs, AutoresetMode[mode], final_info
        self.metadata = {"autoreset_mode": self.mode}
        self.single_observation_space, self.single_action_space = OBSERVATION, Trials.action_space
        self.observation_space = spaces.Box(-100, 100, (num_envs, 6), np.float32)
        self.action_space = spaces.MultiDiscrete([3] * num_envs)
        self.scripts = [Trial(tells) for _ in range(num_envs)]
        self.ended = np.zeros(num_envs, bool)
        self.obs = np.zeros((num_envs, 6), np.float32)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        mask = np.ones(self.num_envs, bool) if options is None else options.pop("reset_mask")
        infos: dict[str, Any] = {}
        for slot in np.flatnonzero(mask):
            self.obs[slot], info = self.scripts[slot].reset(self.np_random)
            infos = self._add_info(infos, info, slot)
        return self.obs.copy(), infos

    def step(self, actions: Any) -> Any:
        reward, flags, infos = np.zeros(self.num_envs), np.zeros((2, self.num_envs), bool), dict[str, Any]()
        for slot, script in enumerate(self.scripts):
            if self.ended[slot] and self.mode is AutoresetMode.NEXT_STEP:
                self.obs[slot], info = script.reset(self.np_random)
                self.ended[slot] = False
            else:
                self.obs[slot], reward[slot], *flags[:, slot], info = script.step(self.np_random)
                self.ended[slot] = flags[:, slot].any()
                if self.ended[slot] and self.mode is AutoresetMode.SAME_STEP:
                    more = {"final_info": info} if self.final_info else info
                    more = {**more, "final_obs": self.obs[slot].copy()}
                    infos = self._add_info(infos, more, slot)
                    self.obs[slot], info = script.reset(self.np_random)
            infos = self._add_info(infos, info, slot)
        return self.obs.copy(), reward, flags[0], flags[1], infos


gymnasium.register("Trials-v0", Trials, vector_entry_point=NativeTrials)
gymnasium.register("Bandit-v0", Bandit)
try:
    import pettingzoo
except ModuleNotFoundError:
    pass
else:

    class Together(pettingzoo.ParallelEnv):  # type: ignore[misc]
        """Two agents with trials of their own, whose episodes end apart."""

        metadata: ClassVar[dict[str, Any]] = {"name": "together"}
        possible_agents: ClassVar[list[str]] = ["left", "right"]

        def __init__(self, tells: str = "ends", fails_at: int = 0) -> None:
            self.scripts = {agent: Trial(tells) for agent in self.possible_agents}
            self.rng, self.fails_at, self.total = np.random.default_rng(0), fails_at, 0

        def observation_space(self, agent: str) -> spaces.Space[Any]:
            return OBSERVATION

        def action_space(self, agent: str) -> spaces.Space[Any]:
            return Trials.action_space

        def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            if seed is not None:
                self.rng = np.random.default_rng(seed)
            self.agents = list(self.possible_agents)
            answers = {agent: self.scripts[agent].reset(self.rng) for agent in self.agents}
            return tuple({agent: answer[part] for agent, answer in answers.items()} for part in range(2))

        def step(self, actions: dict[str, Any]) -> Any:
            self.total += 1
            if self.total == self.fails_at:
                raise RuntimeError("broken on purpose")
            answers = {agent: self.scripts[agent].step(self.rng) for agent in self.agents}
            self.agents = [agent for agent in self.agents if not (answers[agent][2] or answers[agent][3])]
            return tuple({agent: answer[part] for agent, answer in answers.items()} for part in range(5))

    class Turns(pettingzoo.AECEnv):  # type: ignore[misc]
        """Two agents who take turns in the same trial, until its episode ends for both."""

        metadata: ClassVar[dict[str, Any]] = {"name": "turns", "is_parallelizable": True}
        render_mode = None

        def __init__(self, tells: str = "ends") -> None:
            self.possible_agents = ["left", "right"]
            self.script, self.rng = Trial(tells), np.random.default_rng(0)

        def observation_space(self, agent: str) -> spaces.Space[Any]:
            return OBSERVATION

        def action_space(self, agent: str) -> spaces.Space[Any]:
            return Trials.action_space

        def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
            if seed is not None:
                self.rng = np.random.default_rng(seed)
            self.agents, self.agent_selection = list(self.possible_agents), "left"
            self.seen, info = self.script.reset(self.rng)
            self._tell(0.0, False, False, info)
            self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)

        def _tell(self, reward: float, terminated: bool, truncated: bool, info: dict[str, Any]) -> None:
            self.rewards = dict.fromkeys(self.agents, reward)
            self.terminations = dict.fromkeys(self.agents, terminated)
            self.truncations = dict.fromkeys(self.agents, truncated)
            self.infos = {agent: dict(info) for agent in self.agents}

        def observe(self, agent: str) -> Any:
            return self.seen

        def step(self, action: int | None) -> None:
            agent = self.agent_selection
            if self.terminations[agent] or self.truncations[agent]:
                self._was_dead_step(action)
                return
            self._cumulative_rewards[agent] = 0.0
            self.seen, *told = self.script.step(self.rng)
            self._tell(*told)
            self._accumulate_rewards()
            self.agent_selection = "right" if agent == "left" else "left"
