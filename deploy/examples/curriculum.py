"""A callback of one's own: a task that grows with success, numbers beside shoal's, and an end when all is learned."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import shoal
import yaml
from gymnasium import spaces

LONGEST = 8


class Recall(gymnasium.Env[np.ndarray, np.int64]):
    """A sign is shown once and has to be answered ``delay`` steps later, which a bell tells; the answer gives 1 or 0.

    The option ``delay`` of an episode decides how long that is; without it, it is the longest delay.
    """

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    sign = time = delay = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Show a sign."""
        super().reset(seed=seed)
        self.delay = (options or {}).get("delay", LONGEST)
        self.sign, self.time = int(self.np_random.integers(2)), 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Answer, which counts only at the bell."""
        rings = self.time == self.delay
        self.time += 1
        return self._observe(), float(rings and action == self.sign), rings, False, {}

    def _observe(self) -> np.ndarray:
        shown = self.time == 0
        return np.array([shown and self.sign == 0, shown and self.sign == 1, self.time == self.delay], np.float32)


class Curriculum(shoal.Callback):
    """Begins with a delay of one step, and adds one whenever most of the last episodes were answered rightly."""

    def __init__(self, share: float = 0.9, window: int = 300) -> None:
        self.delay, self.share = 1, share
        self.right: deque[bool] = deque(maxlen=window)

    def on_start(self, run: shoal.RunningRun) -> None:
        """Set the first task."""
        run.set_env_options({"delay": self.delay})

    def on_episodes(self, run: shoal.RunningRun, episodes: shoal.EndedEpisodes) -> Mapping[str, float]:
        """Count, and set the next task; metrics.jsonl has the numbers as ``callback/delay`` and ``callback/right``."""
        # Episodes of an easier task are still under way for a while.
        ended = zip(episodes.returns, episodes.lengths, strict=True)
        self.right += [returned == 1 for returned, length in ended if length == self.delay + 1]
        share = sum(self.right) / max(len(self.right), 1)
        if len(self.right) == self.right.maxlen and share >= self.share:
            self.right.clear()
            if self.delay == LONGEST:
                run.stop()
            else:
                self.delay += 1
                run.set_env_options({"delay": self.delay})
        return {"delay": self.delay, "right": share}

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep, so that a resumed run goes on with the same task."""
        return {"delay": self.delay, "right": list(self.right)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.delay = state["delay"]
        self.right.extend(state["right"])


def main(**settings: Any) -> shoal.Run:
    """Train until the longest delay is mastered."""
    curriculum = Curriculum()
    defaults: dict[str, Any] = {
        "total_env_steps": 400_000,
        "actor.unroll_length": 16,
        "learner.learning_rate": 1e-3,
    }
    run = shoal.train(Recall, config=defaults, callbacks=[curriculum], **settings)
    print(f"reached a delay of {curriculum.delay}; {run.summary['env_steps']:,} steps")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
