"""A game of several agents whose every row is kept, and played again by a slow reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from shoal.envs.boundary import DiscreteActions, EnvSpec, StepRows, VectorSpace
from shoal.envs.plain_state import DoesNotFit, read_arrays

ACTIONS = 3


class Duels:
    """Games of ``agents`` agents: each sees its number, the others' last actions (their sum) and the time of the game.

    The reward is the own action less the mean of the others'. Game g lasts 3 to 6 steps, in turn; the first agent ends
    a step before the others. ``log`` has what was done and answered, and ``watch`` is called before every step. Game 0
    is cut off by a fault in the steps ``faulty``; the first games of game 1 have a ``short`` time limit.
    """

    def __init__(
        self,
        games: int,
        agents: int = 2,
        *,
        same_step: bool = False,
        masked: bool = False,
        faulty: tuple[int, ...] = (),
        short: int = 0,
    ) -> None:
        self.spec = EnvSpec(
            env_id="duels",
            observation=VectorSpace(size=4),
            actions=DiscreteActions(names=(tuple("abc"[:ACTIONS]),)),
            same_step=same_step,
            num_agents=agents,
            num_mask=ACTIONS if masked else 0,
        )
        self.num_envs, self.agents, self.masked = games * agents, agents, masked
        self.faults: list[str] = []
        self.short_episode = np.zeros(self.num_envs, np.bool_)
        self.short_episode[agents : 2 * agents] = short > 0
        self.faulty, self.short = faulty, short
        self.action_mask = np.ones((self.num_envs, self.spec.num_mask), np.uint8)
        self.time = np.zeros(games, np.int64)
        self.played = np.zeros(games, np.int64)
        self.last = np.zeros(self.num_envs, np.int64)
        self.log: list[tuple[np.ndarray, StepRows, np.ndarray]] = []
        self.watch: Callable[[], None] = lambda: None
        self.first = np.zeros((self.num_envs, 4), np.float32)

    def _observe(self, obs: np.ndarray) -> None:
        last = self.last.reshape(-1, self.agents)
        others = (last.sum(1, keepdims=True) - last).reshape(-1)
        obs[:, 0] = np.tile(np.arange(self.agents), len(self.time))
        obs[:, 1] = others
        obs[:, 2] = np.repeat(self.time, self.agents)
        obs[:, 3] = np.repeat(self.played % 3, self.agents)
        if self.masked:
            self.action_mask[:] = 1
            self.action_mask[np.arange(self.num_envs), (others + self.time.repeat(self.agents)) % ACTIONS] = 0

    def reset(self, obs: np.ndarray) -> None:
        self._observe(obs)
        self.first = obs.copy()

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        self.watch()
        mask = self.action_mask.copy()
        games, agents = len(self.time), self.agents
        length = 3 + (np.arange(games) + self.played) % 4
        begins = self.time == length  # the next-step form: this call only begins a game
        if len(self.log) in self.faulty:
            begins[0] = True
        self.time += 1
        over = (self.time == length) & ~begins
        last = (self.time == length - 1) & ~begins
        ended = np.repeat(over, agents)
        if not self.spec.same_step:
            # Agent 0 ends a step earlier, and is out of the game until the next one.
            ended[::agents] = last
        chosen = action.reshape(games, agents).astype(np.float32)
        reward = chosen - (chosen.sum(1, keepdims=True) - chosen) / (agents - 1)
        void = np.repeat(begins, agents)
        if not self.spec.same_step:
            void[::agents] |= over
        self.last[:] = action
        anew = over | begins if self.spec.same_step else begins
        if rows.final_obs is not None:
            self._observe(rows.final_obs)
        self.time[anew], self.played[anew] = 0, self.played[anew] + 1
        self.last[np.repeat(anew, agents)] = 0
        self.short_episode[agents : 2 * agents] = self.played[1] < self.short
        self._observe(rows.obs)
        rows.reward[:] = np.where(void, 0.0, reward.reshape(-1))
        rows.is_first[:] = np.repeat(anew, agents) | void
        # Truncated in every other game.
        truncates = np.repeat(self.played % 2 == 1, agents)
        rows.terminated[:], rows.truncated[:] = ended & ~truncates, ended & truncates
        kept = StepRows(*(None if part is None else part.copy() for part in rows))  # type: ignore[arg-type]
        self.log.append((action.copy(), kept, mask))

    def get_state(self) -> dict[str, Any]:
        return {"time": self.time.copy(), "played": self.played.copy(), "last": self.last.copy()}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        try:
            arrays = read_arrays(state, self.get_state())
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        self.time[:], self.played[:], self.last[:] = arrays["time"], arrays["played"], arrays["last"]
        self._observe(obs.copy())
        return {}

    def close(self) -> None:
        pass
