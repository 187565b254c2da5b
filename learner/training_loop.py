"""The training loop: the only loop of a run that ends by itself. Its caller then closes the workers."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from shoal.learner.activations import ActivationSampler
from shoal.learner.checkpoint import CheckpointError, Checkpoints
from shoal.learner.learner_worker import LearnerWorker, Lost, Skipped, StepResult
from shoal.learner.learners import Learners
from shoal.learner.recorded_updates import RecordedUpdates
from shoal.learner.statistics import RunStatistics
from shoal.learner.weight_metrics import measure_weights
from shoal.policy.weights import Weights

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The end of training and the interval of checkpoints."""

    total_env_steps: int
    """Trained environment steps, including those of the runs that this one resumes."""
    checkpoint_every: int
    """Updates between checkpoints; 0 saves only at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """The checkpoints of a run and the state that they hold beside the learner, and its recorded updates."""

    checkpoints: Checkpoints
    updates: RecordedUpdates
    describe: Callable[[], Mapping[str, Any]]
    """Returns the run's state beside the weights."""
    rollouts: Callable[[], Mapping[str, Any] | None] = lambda: None
    """Returns the acting side's state, between two updates; None where it is not this process's."""
    opponents: Callable[[], Mapping[str, Any] | None] = lambda: None
    """Returns the versions that self-play games are played against; None without self-play."""
    undisturbed: Callable[[], AbstractContextManager[object]] = nullcontext
    """Surrounds the writing of a checkpoint, which an interrupt of the thread would end."""
    asked: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set where a checkpoint is wanted after the update that is under way, whichever it is."""


class Observer(Protocol):
    """What is told of updates and checkpoints, in the thread that trains and between updates."""

    def updated(self, result: StepResult) -> None:
        """An update was made.

        Raises:
            ObserverFailed: training has to end.
        """

    def saved(self, path: Path) -> None:
        """A checkpoint was written.

        Raises:
            ObserverFailed: training has to end.
        """


class ObserverFailed(Exception):
    """An observer cannot go on. The run saves and ends."""


def train(
    learners: Learners,
    statistics: RunStatistics,
    saving: Saving,
    limits: Limits,
    stop: threading.Event,
    observer: Observer,
) -> Weights:
    """Update the policy until ``total_env_steps`` or ``stop``; return the last published weights.

    consumes: batches of trajectories     waits for: batch_size segments     unblocked by: the queue, ``stop``
    produces: a new policy version every update

    Raises:
        NonFiniteUpdate: ``max_skipped_updates`` updates in a row were skipped.
        CheckpointError, OSError: the last checkpoint could not be written.
        RuntimeError: the pool ended before the loop did.
        ObserverFailed: ``observer`` raised it; the last update is saved.
    """
    worker = learners.worker
    learner, ledger = worker.learner, worker.queue.ledger
    weights = worker.publish()  # actors cannot start without weights
    statistics.published_bytes += weights.flat.nbytes
    activations = ActivationSampler(learner.policy)
    skipped_in_a_row = 0
    saved_version = -1
    failure: ObserverFailed | None = None
    while ledger.trained < limits.total_env_steps and not stop.is_set():
        result = learners.step(stop)
        if result is None:
            break
        assert worker.weights is not None
        weights = worker.weights
        statistics.published_bytes += weights.flat.nbytes
        for fault in statistics.add_reports(result.reports):
            log.warning("%s", fault)
        statistics.add_log_prob_errors(result.log_prob_errors)
        outcome = result.outcome
        if isinstance(outcome, Lost):
            steps = f"{result.ledger.sampled:,}"
            log.warning("%s; its %s steps are dropped and training goes on", outcome.error, steps)
            continue
        if isinstance(outcome, Skipped):
            skipped_in_a_row += 1
            statistics.skipped_updates += 1
            log.error("an update was skipped: %s", outcome.error)
            saving.updates.write(learner, worker.recorder, learners.recorded)
            if skipped_in_a_row >= learner.config.max_skipped_updates:
                raise outcome.error
            continue
        skipped_in_a_row = 0
        statistics.add_update(learner.policy_version, outcome)
        every = learner.config.weight_metrics_every
        if every and (statistics.updates - 1) % every == 0:
            # Meanwhile the actors act with the new version.
            assert worker.batch is not None
            with worker.clock.time("weight_metrics"):
                statistics.weights = measure_weights(learner.regularizer, activations.sample(worker.batch))
        try:
            observer.updated(result)
        except ObserverFailed as error:
            failure = error
            break
        every = limits.checkpoint_every
        if saving.asked.is_set() or (every and learner.policy_version % every == 0):
            saving.asked.clear()
            saved_version = _save(saving, worker, statistics, observer, required=False)
            if saving.updates.is_due:
                with worker.clock.time("checkpoint"):
                    saving.updates.write(learner, worker.recorder, learners.recorded)
    if saved_version != learner.policy_version:
        _save(saving, worker, statistics, observer, required=True)
    if failure:
        raise failure
    return weights


def _save(
    saving: Saving, worker: LearnerWorker, statistics: RunStatistics, observer: Observer, *, required: bool
) -> int:
    """Save a checkpoint and return its version.

    A failure is counted, and -1 returned; where the checkpoint is ``required``, it is raised.
    """
    learner = worker.learner
    with worker.clock.time("checkpoint"), saving.undisturbed():
        try:
            path = saving.checkpoints.save(
                learner, saving.describe(), rollouts=saving.rollouts(), opponents=saving.opponents()
            )
        except (OSError, CheckpointError) as error:
            if required:
                raise
            statistics.failed_checkpoints += 1
            log.error("checkpoint %d could not be written, training goes on: %s", learner.policy_version, error)
            return -1
    statistics.last_checkpoint_timestamp = time.time()
    observer.saved(path)
    return learner.policy_version
