"""An environment of one's own: train in it, evaluate, and let the trained policy act in one."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import shoal
import yaml
from gymnasium import spaces


class Lamps(gymnasium.Env[dict[str, Any], np.int64]):
    """A lamp of four lights up once; when the bell rings, ``delay`` steps later, pressing its button gives 1."""

    def __init__(self, delay: int = 3) -> None:
        self.observation_space = spaces.Dict(lamps=spaces.MultiBinary(4), bell=spaces.Discrete(2))
        self.action_space = spaces.Discrete(4)
        self.delay = delay
        self.lamp = self.time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Light a lamp up."""
        super().reset(seed=seed)
        self.lamp, self.time = int(self.np_random.integers(4)), 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Press a button, which counts only while the bell rings; the episode ends with it."""
        rings = self.time == self.delay
        self.time += 1
        return self._observe(), float(rings and action == self.lamp), rings, False, {}

    def _observe(self) -> dict[str, Any]:
        lamps = np.zeros(4, np.int8)
        lamps[self.lamp] = self.time == 0
        return {"lamps": lamps, "bell": np.int64(self.time == self.delay)}


def main(**settings: Any) -> shoal.Run:
    """Train, and play one episode with the trained policy."""
    defaults: dict[str, Any] = {
        "total_env_steps": 300_000,
        "env.kwargs": {"delay": 3},
        "actor.unroll_length": 16,
        "learner.learning_rate": 1e-3,
    }
    run = shoal.train(Lamps, config=defaults, **settings)
    played = run.evaluate(episodes=64)
    print(f"mean return of {played.episodes} episodes: {played.mean:.2f}; chance is 0.25, 1 takes a memory")

    policy, env = shoal.load_policy(run.run_dir, greedy=True), Lamps(delay=3)
    obs, _ = env.reset(seed=1)
    is_first, ended, total = True, False, 0.0
    while not ended:
        obs, reward, ended, _, _ = env.step(policy.act(obs, 0, is_first))
        is_first, total = False, total + reward
    print(f"one episode: return {total:.0f}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
