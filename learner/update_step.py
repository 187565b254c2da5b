"""One learner's part in every update: wait for segments, assemble, check, update, book, publish.

The run's own learner goes round in ``learner.training_loop``; learners beside it (``learner.peer_learners``) make one
turn whenever they are asked to.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shoal.learner.batch import BatchAssembler
from shoal.learner.group import LearnerLost
from shoal.learner.learner import Learner, NonFiniteUpdate
from shoal.learner.ledger import Ledger
from shoal.learner.parity_check import LogProbParityCheck
from shoal.learner.statistics import Reported, RunStatistics, reported
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import Trajectory
from shoal.policy.weights import Weights, flatten_weights
from tensordict import TensorDict

log = logging.getLogger(__name__)

NEVER = threading.Event()
"""Never set: for a learner that others wait for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one learner did in one turn; plain data that may cross processes."""

    books: Ledger
    """Of this turn alone; nothing is in flight."""
    all_env_steps: int
    """Environment steps that this update trained, over all learners; 0 where there was none."""
    trajectories: tuple[Reported, ...]
    log_prob_errors: tuple[float, ...]
    """Readings of the parity check."""
    weights_hash: str
    """Of the weights after the turn."""
    beside: Ledger = dataclasses.field(default_factory=Ledger)
    """What else came into the books of a learner beside the run's own since its last turn: unrolls for later turns."""
    lost_unrolls: int = 0
    """Begun and never delivered, at a learner beside the run's own since its last turn."""
    replaced: tuple[tuple[str, str], ...] = ()
    """Rollout workers of this learner that were replaced: the reason in a word, and in a sentence."""
    num_alive: int = 0
    """Rollout workers of this learner that can make unrolls."""
    lags: tuple[int, ...] = ()
    """Of this learner's unrolls under way: versions made since they began."""
    terms: dict[str, float] = dataclasses.field(default_factory=dict)
    staleness: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: NonFiniteUpdate | None = None
    """Why there was no update."""
    lost: LearnerLost | None = None
    """Why there was no update."""


def reconcile(own: StepResult, other: StepResult) -> Ledger:
    """The books of another learner's part in an update, as it ended for the run's own learner.

    One of them may have made the step when the other lost it. The own weights are those that training goes on with:
    what is in them was trained, whatever the other says.
    """
    steps = other.books.sampled
    if own.lost:
        return Ledger(sampled=steps, dropped=Counter(learner_lost=steps))
    if other.lost:
        return Ledger(sampled=steps, trained=steps)
    return other.books


@dataclasses.dataclass(kw_only=True, slots=True)
class UpdateLoop:
    """A learner with what feeds it; each part is owned by whoever built it."""

    learner: Learner
    trajectory_queue: TrajectoryQueue
    assembler: BatchAssembler
    publish_to: Callable[[Weights], Any]
    """Turns weights into what the pool passes to its workers."""
    parity_check: LogProbParityCheck
    statistics: RunStatistics
    """Its stages are timed here."""
    skipped_dir: Path
    """Where batches whose update was refused are kept for inspection."""
    weights: Weights | None = None
    """The last published ones."""
    batch: TensorDict | None = None
    """The last one trained."""

    def turn(self, drive: Callable[[float], None] | None, stop: threading.Event) -> StepResult | None:
        """One update with one batch; None where ``stop`` was set while waiting for it.

        consumes: batch_size segments     waits for: the actors, and the other learners of the group
        produces: a new policy version     unblocked by: the trajectory queue, ``stop``

        Raises:
            NonFiniteUpdate: weights that are not finite came out of it.
            RuntimeError: the pool ended.
        """
        learner, statistics = self.learner, self.statistics
        version = learner.policy_version
        with statistics.time("wait"):
            trajectories = self.trajectory_queue.next_batch(drive, stop)
        if trajectories is None:
            return None
        with statistics.time("assemble"):
            batch = learner.path.to_device(self.assembler.assemble(trajectories))
        with statistics.time("parity_check"):
            errors = [self.parity_check.check(batch)]
        try:
            with statistics.time("update"):
                result = learner.update(batch)
        except NonFiniteUpdate as error:
            self._keep_skipped(batch, error)
            return self._without_update(trajectories, errors, "non_finite", refused=error)
        except LearnerLost as error:
            return self._without_update(trajectories, errors, "learner_lost", lost=error)
        if learner.group:
            statistics.stage_seconds["reduce"] += learner.group.seconds
            learner.group.seconds = 0.0
        self.batch = batch
        books = self.trajectory_queue.book(trajectories, trained=result.env_steps)
        with statistics.time("publish"):
            weights = self.publish()
        return StepResult(
            books=books,
            all_env_steps=result.all_env_steps,
            trajectories=reported(trajectories, version),
            log_prob_errors=_readings([*errors, result.log_prob_error]),
            weights_hash=weights.content_hash,
            terms=result.terms,
            staleness=result.staleness,
        )

    def publish(self) -> Weights:
        """Offer the learner's weights to the actors.

        Raises:
            NonFiniteUpdate: they are not finite.
        """
        weights = flatten_weights(self.learner.policy, self.learner.policy_version)
        if not np.isfinite(weights.flat).all():
            raise NonFiniteUpdate(
                f"the weights of policy version {weights.policy_version} are not finite; they are not published"
            )
        self.parity_check.remember(weights)
        self._publish(weights)
        return weights

    def _publish(self, weights: Weights) -> None:
        self.weights = weights
        self.statistics.published_bytes += weights.flat.nbytes
        self.trajectory_queue.publish(weights.policy_version, self.publish_to(weights))

    def _without_update(
        self, trajectories: list[Trajectory], errors: list[float | None], reason: str, **why: Any
    ) -> StepResult:
        """Weights and optimizer are as before; the actors go on with the weights they have."""
        assert self.weights is not None
        books = self.trajectory_queue.book(trajectories, trained=0, dropped=reason)
        self._publish(self.weights)
        return StepResult(
            books=books,
            all_env_steps=0,
            trajectories=reported(trajectories, self.weights.policy_version),
            log_prob_errors=_readings(errors),
            weights_hash=self.weights.content_hash,
            **why,
        )

    def _keep_skipped(self, batch: TensorDict, error: NonFiniteUpdate) -> None:
        """Save the batch of a refused update."""
        self.skipped_dir.mkdir(parents=True, exist_ok=True)
        stem = f"batch-{self.learner.policy_version:09d}-{time.time_ns()}"
        path = self.skipped_dir / f"{stem}.pt"
        torch.save(dict(batch.cpu().items()), path)
        log.error("an update was refused and its batch saved to %s: %s", path, error)


def _readings(errors: list[float | None]) -> tuple[float, ...]:
    return tuple(error for error in errors if error is not None)
