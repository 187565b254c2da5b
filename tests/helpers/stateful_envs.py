"""Environments whose state is kept in different ways: said, plain data, hidden; and wrappers of users."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import numpy as np


class Walk(gymnasium.Env[np.ndarray, int]):
    """A random walk whose steps also depend on how it was walked before; it ends by chance."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin anywhere."""
        super().reset(seed=seed)
        self.begin(float(self.np_random.normal()))
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Walk a step."""
        place = self.walk(float(action - 1) + float(self.np_random.normal()) / 8)
        return self.observe(), -abs(place), bool(self.np_random.random() < 0.1), False, {}


class PlainWalk(Walk):
    """All in attributes of plain data, also nested ones and one that only comes with the first step."""

    def begin(self, place: float) -> None:
        """Forget what was."""
        self.places, self.counts, self.board = deque([place], maxlen=4), {1: 0, -1: 0}, np.zeros((2, 2))
        self.helper = Helper(self)

    def walk(self, step: float) -> float:
        """The new place."""
        self.latest = step
        self.counts[1 if step > 0 else -1] += 1
        self.board[0, 0] += step
        self.places.append(self.places[-1] + self.helper.slow(step))
        return self.places[-1]

    def observe(self) -> np.ndarray:
        """Place and what else there is."""
        return np.array([sum(self.places), self.counts[1] + self.board.sum()], np.float32)


class SpacedWalk(PlainWalk):
    """With spaces in its attributes, one of which it samples from, as the games of PettingZoo have them."""

    def __init__(self) -> None:
        super().__init__()
        self.spaces = {"a": gymnasium.spaces.Discrete(7), "more": [gymnasium.spaces.Box(0, 1, (2,), np.float32)]}

    def begin(self, place: float) -> None:
        """Sample from a stream of its own from now on."""
        super().begin(place)
        self.spaces["a"].seed(int(self.np_random.integers(1000)))

    def walk(self, step: float) -> float:
        """The new place, which a sample moves."""
        assert self.spaces["a"].n == 7
        assert self.spaces["more"][0].shape == (2,)
        return super().walk(step + float(self.spaces["a"].sample()))


class DrawnWalk(PlainWalk):
    """Its constructor draws a part of it, which is no data: ``part`` is what ``drawn`` decides."""

    def __init__(self, part: str, drawn: int) -> None:
        super().__init__()
        self.rule = (lambda step: step * 2, lambda step: step * 3)[drawn if part == "function" else 0]
        self.kind = (np.float32, np.float16)[drawn if part == "class" else 0]
        self.scaled = scaled_by(drawn if part == "default" else 0)
        if part == "space":
            self.observation_space = gymnasium.spaces.Box(-np.inf, 1e6 + drawn, (2,), np.float32)

    def walk(self, step: float) -> float:
        """The new place."""
        return super().walk(float(self.kind(self.rule(self.scaled(step)))))


def scaled_by(drawn: int) -> Any:
    """A function that keeps a number that was drawn."""
    return lambda step, factor=float(drawn + 1): step * factor


class Perturbed(gymnasium.Wrapper):
    """Other probabilities of an environment's table with every constructor, as randomized dynamics have them."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        probability, place, reward, ended = env.unwrapped.P[0][0][0]
        env.unwrapped.P[0][0] = [(probability, place, reward + np.random.random(), ended)]  # noqa: NPY002 (a global stream, as users do)


class Helper:
    """An object of a class of the user's, with a stream that it shares with its owner and a way back to it."""

    def __init__(self, owner: PlainWalk) -> None:
        self.owner, self.random, self.total = owner, owner.np_random, 0.0

    def slow(self, step: float) -> float:
        """A part of the step."""
        self.total += step
        return step * float(self.random.random()) + self.owner.board[1, 1] + self.total / 100


class SayingWalk(Walk):
    """Its place is hidden in a generator, and it says it."""

    def begin(self, place: float) -> None:
        """Forget what was."""
        self._place = self._walk(place)
        self._last = next(self._place)

    @staticmethod
    def _walk(place: float) -> Any:
        while True:
            place += yield place

    def walk(self, step: float) -> float:
        """The new place."""
        self._last = self._place.send(step)
        return self._last

    def observe(self) -> np.ndarray:
        """The place."""
        return np.array([self._last, 0.0], np.float32)

    def get_state(self) -> dict[str, float]:
        """The place."""
        return {"place": self._last}

    def set_state(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.begin(state["place"])


class BreakingWalk(SayingWalk):
    """It takes no state, and the environment after it fails at its first reset."""

    breaks_next = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin anywhere."""
        if BreakingWalk.breaks_next:
            BreakingWalk.breaks_next = False
            raise RuntimeError("no display")
        return super().reset(seed=seed, options=options)

    def set_state(self, state: dict[str, float]) -> None:
        """Fail."""
        BreakingWalk.breaks_next = True
        raise RuntimeError("no such level")


class HiddenWalk(SayingWalk):
    """The same, and it does not say it."""

    get_state = None


class Smoothing(gymnasium.Wrapper):
    """A wrapper with statistics of its own, and a stream."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.mean, self.count, self.inner, self.random = np.zeros(2), 0, env.unwrapped, np.random.default_rng(3)
        self.last: list[np.ndarray] = []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Begin; the statistics go on."""
        obs, info = self.env.reset(**kwargs)
        return self._smooth(obs), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Step, and smooth what is seen."""
        obs, *rest = self.env.step(action)
        return self._smooth(obs), *rest

    def _smooth(self, obs: np.ndarray) -> np.ndarray:
        self.count += 1
        self.mean = self.mean + (obs - self.mean) / self.count + self.random.normal(size=2) / 9
        self.last = [*self.last[-2:], obs.copy()]
        return (obs - self.mean + len(self.last)).astype(np.float32)


class Remembering(gymnasium.Wrapper):
    """It holds the very array that its environment goes on writing into."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        """Begin."""
        answer = self.env.reset(**kwargs)
        self.board = self.env.unwrapped.board[0]
        return answer


for _kind in (PlainWalk, SayingWalk, HiddenWalk, BreakingWalk):
    gymnasium.register(f"{_kind.__name__}-v0", entry_point=_kind, max_episode_steps=17)
