"""Who the data of a run comes from: the part of every actor in what was trained lately."""

from __future__ import annotations

from collections import Counter, deque

PER_ACTOR = 16
"""Unrolls per actor, on average, that shares are computed over."""


class DataShare:
    """Trained environment steps by actor over the latest trajectories; one thread adds them, others read.

    Args:
        num_actors: all actors of the run. One that delivers nothing has a share, too: 0.
    """

    def __init__(self, num_actors: int) -> None:
        self._num_actors = num_actors
        self._latest: deque[tuple[int, int]] = deque(maxlen=PER_ACTOR * num_actors)

    def add(self, actor: int, env_steps: int) -> None:
        """Add a trained trajectory of ``env_steps``."""
        self._latest.append((actor, env_steps))

    def ratios(self) -> dict[str, float]:
        """Steps of the ``least`` and of the ``most`` represented actor, divided by an equal share; 1 is equal.

        Empty until there are enough trajectories to judge by.
        """
        latest = list(self._latest)
        if len(latest) < PER_ACTOR * self._num_actors:
            return {}
        steps = Counter(dict.fromkeys(range(self._num_actors), 0))
        for actor, env_steps in latest:
            steps[actor] += env_steps
        equal = max(steps.total(), 1) / self._num_actors
        return {"least": min(steps.values()) / equal, "most": max(steps.values()) / equal}
