"""Learning curves: what the episodes of training returned, over environment steps and wall clock."""

# P points

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

EPISODES = 100
"""The least number of episodes that a point is the mean of."""
POINTS = 1000
"""The most points of a curve that are kept."""


class Reached(NamedTuple):
    """When the mean return was at the threshold first."""

    env_steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """Mean return of the last ``EPISODES`` episodes, from the first moment at which there were so many."""

    env_steps: np.ndarray
    """int64 [P]: trained by then, ascending."""
    seconds: np.ndarray
    """float64 [P]: since the command, its start-up included."""
    mean: np.ndarray
    """float64 [P]"""

    def reached(self, threshold: float, budget: int) -> Reached | None:
        """The first point at ``threshold`` or above within ``budget`` environment steps."""
        there = np.flatnonzero((self.mean >= threshold) & (self.env_steps <= budget))
        if not len(there):
            return None
        return Reached(int(self.env_steps[there[0]]), float(self.seconds[there[0]]))

    def best(self, budget: int) -> float | None:
        """The highest mean within ``budget`` environment steps."""
        within = self.mean[self.env_steps <= budget]
        return float(within.max()) if len(within) else None

    @property
    def rate(self) -> float | None:
        """Environment steps per second between the first point and the last."""
        if len(self.mean) < 2 or self.seconds[-1] <= self.seconds[0]:
            return None
        return float((self.env_steps[-1] - self.env_steps[0]) / (self.seconds[-1] - self.seconds[0]))

    def thinned(self) -> Curve:
        """At most ``POINTS`` points, evenly taken, the last among them."""
        if len(self.mean) <= POINTS:
            return self
        chosen = np.linspace(0, len(self.mean) - 1, POINTS).round().astype(np.int64)
        return Curve(self.env_steps[chosen], self.seconds[chosen], self.mean[chosen])

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, by name."""
        return {
            "env_steps": self.env_steps.tolist(),
            "seconds": [round(second, 2) for second in self.seconds.tolist()],
            "mean": self.mean.tolist(),
        }

    @classmethod
    def of_json(cls, lists: dict[str, list[float]]) -> Curve:
        """What ``to_json`` made."""
        return cls(
            np.array(lists["env_steps"], np.int64), np.array(lists["seconds"], float), np.array(lists["mean"], float)
        )


def moving_mean(env_steps: np.ndarray, seconds: np.ndarray, episodes: np.ndarray, returns: np.ndarray) -> Curve:
    """A curve of what was counted at P moments: the mean over the fewest last moments that have ``EPISODES`` episodes
    together.

    Args:
        env_steps: [P] so far, ascending.
        seconds: [P] since the command.
        episodes: [P] that ended since the moment before.
        returns: [P] sum of what these returned.
    """
    ended = np.concatenate(([0], np.cumsum(episodes)))
    summed = np.concatenate(([0.0], np.cumsum(returns)))
    last = np.arange(1, len(ended))
    # The latest moment after which EPISODES ended up to the last one. Where there is none, there is no mean yet.
    first = np.searchsorted(ended, ended[1:] - EPISODES, side="right") - 1
    full = first >= 0
    first, last = first[full], last[full]
    mean = (summed[last] - summed[first]) / (ended[last] - ended[first])
    return Curve(np.asarray(env_steps, np.int64)[full], np.asarray(seconds, float)[full], mean)


def of_run(run_dir: Path, began: float) -> Curve:
    """The curve of a run of ours, out of its ``metrics.jsonl``; its command began at ``began``, in Unix seconds."""
    env_steps, seconds, episodes, returns = [], [], [], []
    before = 0
    for line in _lines(run_dir / "metrics.jsonl"):
        count = int(line["episode_return/count"])
        env_steps.append(line["env_steps"])
        seconds.append(line["time"] - began)
        episodes.append(count - before)
        returns.append((line["episode_return/mean"] or 0.0) * (count - before))
        before = count
    return moving_mean(np.array(env_steps), np.array(seconds), np.array(episodes, np.int64), np.array(returns))


def of_episodes(directory: Path, began: float) -> Curve:
    """The curve of a peer, out of what ``peers/episodes.py`` wrote: a file for each environment, and in each line Unix
    seconds, environment steps so far, and how many episodes ended since the line before with what sum of returns."""
    events = []
    for path in sorted(directory.iterdir()):
        before = 0
        for text in path.read_text().splitlines():
            at, steps, ended, returned = text.split()
            events.append((float(at), int(steps) - before, int(ended), float(returned)))
            before = int(steps)
    at, steps, ended, returned = np.array(sorted(events)).reshape(-1, 4).T
    return moving_mean(np.cumsum(steps), at - began, ended.astype(np.int64), returned)


def _lines(path: Path) -> Iterable[dict[str, float]]:
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        yield json.loads(text)
