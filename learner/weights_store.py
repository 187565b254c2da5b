"""The newest weights that rollout workers may start an unroll with."""

from __future__ import annotations

from typing import Any


class WeightsStore:
    """One version at a time; it holds no lock (``learner.trajectory_queue`` has one for all its parts)."""

    def __init__(self) -> None:
        self.policy_version = -1
        """Version of ``newest``; -1 before the first weights."""
        self.newest: Any = None
        """The weights, or a reference to them, as a pool passes them to its workers."""

    def publish(self, policy_version: int, weights: Any) -> None:
        """Replace the weights."""
        self.policy_version, self.newest = policy_version, weights
