"""Environments that answer what a case says, in every vectorization: sloppy answers, wrong ones, of any shape.

``CASES`` maps a name to what an environment declares and to what it answers in its t-th step (0 is the reset).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from shoal.envs.boundary import VectorEnvironment
from shoal.envs.config import AdapterOptions
from shoal.envs.registry import make_vector_env

HOWS = ("sync", "async", "native", "pettingzoo")
SLOTS = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One environment."""

    obs: Callable[[int], Any]
    space: spaces.Space[Any] = dataclasses.field(default_factory=lambda: spaces.Box(-9, 9, (2,), np.float32))
    reward: Callable[[int], Any] = lambda t: 0.5 * t
    terminated: Callable[[int], Any] = lambda t: t == 4
    truncated: Callable[[int], Any] = lambda t: False
    info: Callable[[int], dict[str, Any]] = lambda t: {}
    action: spaces.Space[Any] = dataclasses.field(default_factory=lambda: spaces.Discrete(3))


def picture(shape: tuple[int, ...], dtype: Any, high: float) -> Callable[[int], np.ndarray]:
    """Numbers from 0 to ``high`` that differ at every place and in every step."""
    count = int(np.prod(shape))
    if np.issubdtype(dtype, np.floating):
        return lambda t: (((np.arange(count) + t) % 97) / 97 * high).reshape(shape).astype(dtype)
    return lambda t: ((np.arange(count) * 7 + t) % (int(high) + 1)).reshape(shape).astype(dtype)


def pictured(shape: tuple[int, ...], dtype: Any = np.uint8, high: float = 255, low: float = 0) -> Case:
    return Case(picture(shape, dtype, high), spaces.Box(low, high, shape, dtype=dtype))


def even(t: int) -> np.ndarray:
    return np.array([t, 2 * t], np.float32)


def info(t: int) -> dict[str, Any]:
    """Numbers, what is none, and at the episode's end others than before."""
    if t != 4:
        return {"is_success": False, "score": -1.0}
    return {
        "is_success": np.bool_(True),
        "score": np.array([7.5]),
        "episode": {"r": np.float32(2.5), "name": "x"},
        "words": "no number",
        "picture": np.zeros((4, 4)),
        "nan": float("nan"),
    }


def never(t: int) -> bool:
    return False


def mask(t: int) -> np.ndarray:
    """Legal in step t: two of five actions, others in every step."""
    row = np.zeros(5, np.int8)
    row[[t % 5, (t + 3) % 5]] = 1
    return row


def two_masks(t: int) -> tuple[np.ndarray, np.ndarray]:
    return np.eye(3, dtype=np.int8)[t % 3], np.array([1, t % 2], np.int8)


def hidden(t: int) -> dict[str, Any]:
    return {"observation": even(t), "action_mask": mask(t)}


FIVE, PAIR = spaces.Discrete(5, start=2), spaces.MultiDiscrete([3, 2])
MASK = spaces.Box(0, 1, (5,), np.int8)
PART = spaces.Box(-9, 99, (2,), np.float32)
UNBOUNDED = spaces.Box(-np.inf, np.inf, (2,), np.float32)
WIDE = spaces.Box(-np.inf, np.inf, (512,), np.float32)
HUGE = np.finfo(np.float32).max
CASES: dict[str, Case] = {
    "grey": pictured((84, 84)),
    "grey with an axis": pictured((84, 84, 1)),
    "stack": pictured((4, 84, 84)),
    "channels first": pictured((3, 64, 64)),
    "stack of colours": pictured((4, 84, 84, 3)),
    "stack, channels first": pictured((2, 3, 40, 44)),
    "wide": pictured((3, 48, 64)),
    "small": pictured((32, 32, 3)),
    "float": pictured((64, 64, 3), np.float32, 1.0),
    "float first": pictured((3, 36, 36), np.float64, 1.0),
    "board": pictured((8, 8, 17), np.bool_, 1),
    "codes": pictured((12, 12, 3), np.int64, 10),
    "either": pictured((9, 12, 9)),
    "cube": pictured((64, 64, 64)),
    "table": pictured((4, 3)),
    "leaves its bounds": Case(lambda t: np.array([5 * t, 0], np.float32), terminated=never),
    "huge": Case(lambda t: np.full(512, HUGE if t == 2 else -0.5, np.float32), WIDE, terminated=never),
    "huge float64": Case(lambda t: np.full(512, -1e300 if t == 2 else -0.5), WIDE),
    "informs": Case(even, info=info),
    "informs at a truncation": Case(even, info=info, terminated=never, truncated=lambda t: t == 4),
    "informs otherwise": Case(even, info=lambda t: {"other": t}),
    "mask in info": Case(even, PART, info=lambda t: {"action_mask": mask(t)}, action=FIVE),
    "mask in obs": Case(hidden, spaces.Dict(observation=PART, action_mask=MASK), action=FIVE),
    "mask in obs, truncated": Case(
        hidden, spaces.Dict(observation=PART, action_mask=MASK), lambda t: 0.5 * t, never, lambda t: t == 4, action=FIVE
    ),
    "mask beside others": Case(
        lambda t: {"a": even(t), "action_mask": mask(t), "b": even(t)},
        spaces.Dict(a=PART, action_mask=spaces.MultiBinary(5), b=PART),
        action=FIVE,
    ),
    "masks in a list": Case(even, PART, info=lambda t: {"action_mask": list(two_masks(t))}, action=PAIR),
    "masks in a tuple of obs": Case(
        lambda t: {"observation": even(t), "action_mask": two_masks(t)},
        spaces.Dict(
            observation=PART, action_mask=spaces.Tuple((spaces.MultiBinary(3), spaces.Box(0, 1, (2,), np.int8)))
        ),
        action=PAIR,
    ),
    "a mask in steps": Case(even, PART, info=lambda t: {"action_mask": np.ones(5, np.int8)} if t else {}, action=FIVE),
    "a mask of bits": Case(
        even, PART, info=lambda t: {"action_mask": np.ones(3, np.int8)}, action=spaces.MultiBinary(3)
    ),
    "masks of two choices": Case(even, PART, info=lambda t: {"action_mask": two_masks(t)}, action=PAIR),
    "no choice": Case(even, PART, info=lambda t: {"action_mask": mask(t) * (t % 2)}, action=FIVE),
    "parts": Case(
        lambda t: {"number": even(t), "picture": picture((32, 32, 3), np.uint8, 255)(t), "choice": 1 + t % 3},
        spaces.Dict(
            number=spaces.Box(-9, 99, (2,), np.float64),
            picture=spaces.Box(0, 255, (32, 32, 3), np.uint8),
            choice=spaces.Discrete(5, start=1),
        ),
        action=spaces.Box(np.array([-3, 0], np.float32), np.array([9, 1], np.float32)),
    ),
    "endless": Case(even, UNBOUNDED, terminated=never),
    "ends late": Case(even, UNBOUNDED, terminated=lambda t: t == 12),
}


class EchoEnv(gymnasium.Env[Any, Any]):
    """A case as a gymnasium environment."""

    def __init__(self, case: str) -> None:
        self.case, self.t = CASES[case], 0
        self.observation_space, self.action_space = self.case.space, self.case.action

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.case.obs(0), self.case.info(0)

    def step(self, action: Any) -> Any:
        legal = self.case.info(self.t).get("action_mask")
        if legal is None and isinstance(obs := self.case.obs(self.t), dict):
            legal = obs.get("action_mask")
        if isinstance(legal, np.ndarray) and isinstance(self.action_space, spaces.Discrete) and legal.any():
            assert legal[action - self.action_space.start], f"action {action} is illegal: {legal}"
        self.t += 1
        case, t = self.case, self.t
        return case.obs(t), case.reward(t), case.terminated(t), case.truncated(t), case.info(t)


class Methodical(EchoEnv):
    """Says its masks by a method, as for sb3-contrib."""

    def __init__(self) -> None:
        super().__init__("mask in info")

    def action_masks(self) -> np.ndarray:
        return mask(self.t).astype(bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed=seed)[0], {}

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"score": self.t}


class EchoVector(VectorEnv[Any, Any, Any]):
    """The same as a native vector that resets in the next step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  (as gymnasium has it)

    def __init__(self, num_envs: int, case: str) -> None:
        self.num_envs, self.envs = num_envs, [EchoEnv(case) for _ in range(num_envs)]
        self.single_observation_space, self.single_action_space = CASES[case].space, CASES[case].action
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.ended = [False] * num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        observations = []
        for slot, env in enumerate(self.envs):
            obs, info = env.reset()
            observations.append(obs)
            infos = self._add_info(infos, info, slot)
        self.ended = [False] * self.num_envs
        return self._stack(observations), infos

    def step(self, actions: Any) -> Any:
        infos: dict[str, Any] = {}
        answers = []
        for slot, env in enumerate(self.envs):
            obs, info = env.reset() if self.ended[slot] else (None, {})
            answer = (obs, 0.0 * np.asarray(env.case.reward(1)), env.case.terminated(1), False, info)
            if not self.ended[slot]:
                answer = env.step(actions[slot])
            self.ended[slot] = bool(answer[2]) or bool(answer[3])
            infos = self._add_info(infos, answer[4], slot)
            answers.append(answer)
        obs, rewards, terminated, truncated, _ = zip(*answers, strict=True)
        return self._stack(obs), np.stack(rewards), np.stack(terminated), np.stack(truncated), infos

    def _stack(self, observations: Any) -> Any:
        if isinstance(self.single_observation_space, spaces.Dict):
            return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
        return np.stack(observations)


gymnasium.register("Echo-v0", "echo_envs:EchoEnv", vector_entry_point="echo_envs:EchoVector")


def parallel_env(case: str) -> Any:
    """The same as a game of two agents who end together."""
    from pettingzoo import ParallelEnv

    class EchoGame(ParallelEnv):  # type: ignore[misc, type-arg]
        possible_agents = ["a", "b"]  # noqa: RUF012
        metadata = {"name": "echo"}  # noqa: RUF012

        def __init__(self) -> None:
            self.agents: list[str] = []
            self.envs = {agent: EchoEnv(case) for agent in self.possible_agents}

        def observation_space(self, agent: str) -> Any:
            return CASES[case].space

        def action_space(self, agent: str) -> Any:
            return CASES[case].action

        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            self.agents = list(self.possible_agents)
            answers = {agent: env.reset() for agent, env in self.envs.items()}
            return tuple({agent: answer[part] for agent, answer in answers.items()} for part in range(2))

        def step(self, actions: dict[str, Any]) -> Any:
            answers = {agent: self.envs[agent].step(action) for agent, action in actions.items()}
            if any(answer[2] or answer[3] for answer in answers.values()):
                self.agents = []
            return tuple({agent: answer[part] for agent, answer in answers.items()} for part in range(5))

    return EchoGame()


def echo(how: str, case: str, **options: Any) -> VectorEnvironment:
    """``SLOTS`` slots of a case; ``options`` are those of ``AdapterOptions``."""
    if how == "pettingzoo":
        return make_vector_env("pettingzoo:echo_envs:parallel_env", SLOTS, 0, AdapterOptions(**options), case=case)
    return make_vector_env("echo_envs:Echo-v0", SLOTS, 0, AdapterOptions(vectorization=how, **options), case=case)
