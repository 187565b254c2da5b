"""An actor that delivers more, and other, than it was asked for; Ray's workers import this module too."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import WorkerSetup
from shoal.policy.weights import Weights

SCRIPT = ("own", "again", "own", "first", "late", "own", "early", "stranger", "own", "predecessor")
"""The unrolls of a restart index, in turn; those after them are its own."""
REFUSED = Counter(duplicate=3, malformed=1)
"""The number of refused unrolls of a first restart index, by reason."""
REFUSED_OF_A_SUCCESSOR = Counter(duplicate=4, malformed=1)


class Replaying:
    """In place of a rollout worker."""

    def __init__(self, worker: RolloutWorker, stranger: RolloutWorker, told_by: Path | None, tells: Path) -> None:
        self._worker, self._stranger, self._told_by, self._tells = worker, stranger, told_by, tells
        self._sent: list[np.ndarray] = []
        self._early: np.ndarray | None = None
        self._calls = 0

    def rollout(self, weights: Weights) -> np.ndarray:
        """The next of the script."""
        what = SCRIPT[self._calls] if self._calls < len(SCRIPT) else "own"
        self._calls += 1
        payload = self._make(what, weights)
        self._sent.append(payload)
        return payload

    def _make(self, what: str, weights: Weights) -> np.ndarray:
        if what == "again":
            return self._sent[-1]
        if what == "first":
            return self._sent[0]
        if what == "late":  # the one before it comes after it
            self._early = self._worker.rollout(weights)
        if what == "early":
            assert self._early is not None
            return self._early
        if what == "stranger":
            return self._stranger.rollout(weights)
        if what == "predecessor" and self._told_by is not None:
            return np.fromfile(self._told_by, np.uint8)
        payload = self._worker.rollout(weights)
        if not self._sent:
            payload.tofile(self._tells)
        return payload

    def close(self) -> None:
        """Both workers."""
        self._worker.close()
        self._stranger.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplayingSetup(WorkerSetup):
    """``folder``: where restart indices leave their first unroll to the next."""

    folder: Path

    def make_worker(self, actor: int, restart_index: int, *_: Any) -> Any:
        """Not a RolloutWorker, but what an actor uses of one."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(WorkerSetup)}
        ours, other = WorkerSetup(**plain), WorkerSetup(**plain | {"run_id": "yesterday"})
        before = self.folder / f"{actor}-{restart_index - 1}"
        return Replaying(
            ours.make_worker(actor, restart_index),
            other.make_worker(actor, restart_index),
            before if before.exists() else None,
            self.folder / f"{actor}-{restart_index}",
        )
