"""Environments whose every answer is known, with a plain loop that plays them; worker processes import this module too.

``ScriptedLog-v0``, as gymnasium has it, alone and as a native vector of any autoreset mode.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

NUM_ACTIONS = 3


class Script:
    """A state that remembers everything since ``salt``: (episode, step, digest of all actions), and ends by it."""

    def __init__(self, salt: int) -> None:
        self.salt, self.episode = salt, -1
        self.step_, self.digest = 0, 0

    def reset(self) -> tuple[int, int, int]:
        self.episode, self.step_ = self.episode + 1, 0
        self.digest = (self.salt * 7919 + self.digest * 31 + self.episode) % 9973
        return self.state

    def step(self, action: int) -> tuple[tuple[int, int, int], float, bool, bool]:
        self.step_ += 1
        self.digest = (self.digest * 131 + 17 * action + 1) % 9973
        terminated, truncated = self.digest % 5 == 0, self.digest % 7 == 0 or self.step_ == 9
        return self.state, self.digest / 8, terminated, truncated

    @property
    def state(self) -> tuple[int, int, int]:
        return self.episode, self.step_, self.digest


class Episode(NamedTuple):
    """One episode: T + 1 states, the last of them final, T actions and rewards, and how it ended."""

    states: list[tuple[int, ...]]
    rewards: list[float]
    terminated: bool
    truncated: bool


def choose(slot: int, state: Any) -> int:
    """An action that depends on the slot and on all of the state, so that equal episodes mean equal states."""
    return int(slot + state[0] + state[1] + state[2]) % NUM_ACTIONS


def play_script(slot: int, salt: int, num_episodes: int) -> list[Episode]:
    """The reference: reset, step to the end, again."""
    script, episodes = Script(salt), []
    for _ in range(num_episodes):
        states, rewards, terminated, truncated = [script.reset()], [], False, False
        while not (terminated or truncated):
            state, reward, terminated, truncated = script.step(choose(slot, states[-1]))
            states.append(state)
            rewards.append(reward)
        episodes.append(Episode(states, rewards, terminated, truncated))
    return episodes


SPACES = {
    "box": spaces.Box(-1, 1e5, (3,), np.float32),
    "dict": spaces.Dict(
        {
            "episode": spaces.Box(-1, 1e5, (), np.float64),
            "rest": spaces.Tuple((spaces.Box(0, 20, (1,), np.int64), spaces.Box(0, 1e4, (1,), np.float32))),
        }
    ),
}


def observe(kind: str, state: tuple[int, int, int]) -> Any:
    if kind == "box":
        return np.array(state, np.float32)
    return {"episode": np.float64(state[0]), "rest": (np.array(state[1:2]), np.array(state[2:], np.float32))}


class ScriptedLog(gymnasium.Env[Any, int]):
    """The script as a gymnasium environment. In its ``at``-th step it breaks in the way ``how``, once if there is a
    ``marker`` file to say that it did.
    """

    action_space = spaces.Discrete(NUM_ACTIONS)

    def __init__(self, salt: int = 0, kind: str = "box", how: str = "", at: int = 0, marker: str = "") -> None:
        self.observation_space = SPACES[kind]
        self.script, self.kind = Script(salt), kind
        self.how, self.at, self.marker, self.total = how, at, marker, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return observe(self.kind, self.script.reset()), {}

    def step(self, action: int) -> Any:
        self.total += 1
        if self.how and self.total >= self.at and self._first():
            match self.how:
                case "raises":
                    raise RuntimeError("100% lost")
                case "interrupts":
                    raise KeyboardInterrupt
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exits":
                    os._exit(3)
                case "hangs":
                    time.sleep(3600)
        state, reward, terminated, truncated = self.script.step(action)
        return observe(self.kind, state), reward, terminated, truncated, {"unused": state}

    def close(self) -> None:
        if self.how == "close hangs" and self.total:
            time.sleep(3600)

    def _first(self) -> bool:
        if not self.marker:
            return True
        try:
            Path(self.marker).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class ScriptedVector(VectorEnv[Any, Any, Any]):
    """The same as a native vector. ``declares`` is what its metadata say, ``mode`` what it does."""

    def __init__(
        self,
        num_envs: int,
        salt: int = 0,
        kind: str = "box",
        mode: str = "NEXT_STEP",
        declares: Any = "",
        final: str = "object",
        how: str = "",
        at: int = 0,
    ) -> None:
        self.num_envs, self.kind, self.final, self.how, self.at = num_envs, kind, final, how, at
        self.mode = AutoresetMode[mode]
        self.metadata = {"autoreset_mode": self.mode} if declares == "" else {"autoreset_mode": declares}
        if declares is None:
            self.metadata = {}
        self.single_observation_space, self.single_action_space = SPACES[kind], spaces.Discrete(NUM_ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.scripts = [Script(salt) for _ in range(num_envs)]
        self.ended = [False] * num_envs
        self.total = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        # As gymnasium's own do: the key is gone afterwards, and another mask is refused.
        mask = np.ones(self.num_envs, bool) if options is None else options.pop("reset_mask")
        assert isinstance(mask, np.ndarray)
        assert mask.dtype == np.bool_
        assert mask.any()
        if self.how == "resets all":
            mask[:] = True
        for slot in np.flatnonzero(mask):
            self.scripts[slot].reset()
            self.ended[slot] = False
        mask[:] = False
        return self._observe([script.state for script in self.scripts]), {}

    def step(self, actions: Any) -> Any:
        self.total += 1
        states, finals = [], [None] * self.num_envs
        reward, flags = np.zeros(self.num_envs), np.zeros((2, self.num_envs), bool)
        for slot, script in enumerate(self.scripts):
            assert not (self.ended[slot] and self.mode is AutoresetMode.DISABLED), "stepped after the end"
            if self.ended[slot]:
                states.append(script.reset())
                self.ended[slot] = False
                continue
            state, reward[slot], *flags[:, slot] = script.step(int(actions[slot]))
            self.ended[slot] = bool(flags[:, slot].any())
            if self.ended[slot] and self.mode is AutoresetMode.SAME_STEP:
                finals[slot], state = state, script.reset()
                self.ended[slot] = False
            states.append(state)
        answer = [self._observe(states), reward, flags[0], flags[1], self._infos(finals)]
        if self.total == self.at:
            self._break(answer)
        return tuple(answer)

    def _infos(self, finals: list[Any]) -> dict[str, Any]:
        mask = np.array([final is not None for final in finals])
        if not mask.any() or self.final == "none":
            return {}
        if self.final == "stacked":
            return {"final_obs": self._observe([final or (-9, -9, -9) for final in finals]), "_final_obs": mask}
        array = np.full(self.num_envs, None, object)
        for slot in np.flatnonzero(mask):
            array[slot] = observe(self.kind, finals[slot])
        return {"final_obs": array} if self.final == "no mask" else {"final_obs": array, "_final_obs": mask}

    def _observe(self, states: list[Any]) -> Any:
        ones = [observe(self.kind, state) for state in states]
        if self.kind == "box":
            return np.stack(ones)
        rest = tuple(np.stack([one["rest"][part] for one in ones]) for part in range(2))
        return {"episode": np.stack([one["episode"] for one in ones]), "rest": rest}

    def _break(self, answer: list[Any]) -> None:
        match self.how:
            case "raises":
                raise RuntimeError("100% lost")
            case "obs nan":
                answer[0][1, 2] = np.nan
            case "obs shape":
                answer[0] = answer[0][:, :2]
            case "obs dtype":
                answer[0] = answer[0].astype("<U8")
            case "reward nan":
                answer[1][1] = np.nan
            case "reward huge":
                answer[1][0] = 1e30
            case "reward shape":
                answer[1] = np.stack([answer[1]] * 2, 1)
            case "terminated two":
                answer[2] = answer[2].astype(np.int64) + 2
            case "truncated shape":
                answer[3] = answer[3][:1]
            case "short":
                del answer[3]


gymnasium.register("ScriptedLog-v0", "scripted_envs:ScriptedLog", vector_entry_point="scripted_envs:ScriptedVector")
