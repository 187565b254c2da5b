"""Worlds whose features, values and actions can be had in any order and under any name."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

SCALES = {"hp": 7.0, "ore": 3.0, "crystal": 3.0, "fog": 5.0, "last": 1.0}
MOVES = {"stay": (0, 0), "north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}
FEATURES, VALUES, ACTIONS = ("hp", "ore", "tag"), ("wall", "mine", "altar"), tuple(MOVES)


class Hills(gymnasium.Env[np.ndarray, int]):
    """Five by five cells with ore to step on. Every order and every name is an argument; the world is the same."""

    history: ClassVar[list[tuple[Any, ...]]] = []
    """(step, place, action's name) of every step of all instances."""

    def __init__(
        self,
        features: tuple[str, ...] = FEATURES,
        values: tuple[str, ...] = VALUES,
        actions: tuple[str, ...] = ACTIONS,
        called: dict[str, str] | None = None,
        scale: float = 1.0,
        backwards: bool = False,
    ) -> None:
        """``called`` gives the names that the world's own (keys) have here; "" are ids that it never uses."""
        called = called or {}
        self.features, self.values, self.actions, self.backwards = features, values, actions, backwards
        names = tuple(called.get(name, name) for name in features)
        self.metadata = {
            "render_modes": [],
            "token_space": {
                "width": 5,
                "height": 5,
                "num_tokens": 60,
                "feature_names": names,
                "feature_normalizations": tuple(scale * SCALES.get(name, 1.0) for name in features),
                "categorical_features": ((features.index("tag"), tuple(called.get(v, v) for v in values)),),
                "global_coordinate": 0xFE,
            },
        }
        self.meanings = [called.get(name, name) for name in actions]
        self.observation_space = spaces.Box(0, 255, (60, 3), dtype=np.uint8)
        self.action_space = spaces.Discrete(len(actions))

    def get_action_meanings(self) -> list[str]:
        return self.meanings

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.hp = 0, int(self.np_random.integers(1, 8))
        self.place = np.array([2, 2])
        self.ore = self.np_random.integers(0, 4, (5, 5))
        self.tags = self.np_random.integers(0, 4, (5, 5))
        return self._tokens(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        name = self.actions[action]
        Hills.history.append((self.steps, *self.place.tolist(), name))
        self.place = np.clip(self.place + MOVES.get(name, (0, 0)), 0, 4)
        reward = float(self.ore[tuple(self.place)])
        self.ore[tuple(self.place)] = 0
        self.steps += 1
        return self._tokens(), reward, self.steps == 6, False, {}

    def _tokens(self) -> np.ndarray:
        seen: list[tuple[int, str, int]] = [(0xFE, "hp", self.hp), (0xFE, "fog", self.steps)]
        for row, column in np.ndindex(5, 5):
            here = row << 4 | column
            seen.append((here, "ore", int(self.ore[row, column])))
            if self.tags[row, column] < 3 and VALUES[self.tags[row, column]] in self.values:
                seen.append((here, "tag", self.values.index(VALUES[self.tags[row, column]])))
        seen.append((int(self.place[0]) << 4 | int(self.place[1]), "ore", 9))
        known = [(at, self.features.index(name), value) for at, name, value in seen if name in self.features]
        tokens = np.full((60, 3), 255, np.uint8)
        # The last token of a cell and feature wins: the order of others is free.
        tokens[: len(known)] = [*reversed(known[:-1]), known[-1]] if self.backwards else known
        return tokens


class Gauges(gymnasium.Env[dict[str, Any], int]):
    """Numbers with names; nothing but the declaration."""

    action_space = spaces.Discrete(2)

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.observation_space = spaces.Dict([(part, spaces.Box(-1, 1, (2,))) for part in parts])


gymnasium.register("Hills-v0", Hills)
gymnasium.register("Gauges-v0", Gauges)
