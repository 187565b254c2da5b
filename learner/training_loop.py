"""The training loop: the only loop of a run that ends by itself. Its caller then closes the workers."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from shoal.learner.activations import ActivationSampler
from shoal.learner.checkpoint import CheckpointError
from shoal.learner.learner import Learner
from shoal.learner.learner_worker import Empty, Lost, Skipped, StepResult, Trained
from shoal.learner.learners import Learners
from shoal.learner.recorded_updates import RecordedUpdates
from shoal.learner.repeated_messages import RepeatedMessages
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
class TrainedPolicy:
    """A policy of the run: who trains it, and what is counted and recorded of that."""

    name: str
    """Empty where it is the only one."""
    learners: Learners
    statistics: RunStatistics
    updates: RecordedUpdates


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """The checkpoints of a run."""

    write: Callable[[], Path]
    """Writes one of all policies, between two updates; raises OSError or CheckpointError."""
    undisturbed: Callable[[], AbstractContextManager[object]] = nullcontext
    """Surrounds the writing of a checkpoint, which an interrupt of the thread would end."""
    asked: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set where a checkpoint is wanted after the update that is under way, whichever it is."""


class Observer(Protocol):
    """What is told of updates and checkpoints, in the thread that trains and between updates."""

    def updated(self, policy: str, result: StepResult) -> None:
        """An update of the policy of this name was made, and so were those of the others that were due with it.

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
    policies: Sequence[TrainedPolicy],
    saving: Saving,
    limits: Limits,
    stop: threading.Event,
    observer: Observer,
) -> list[Weights]:
    """Update the policies until ``total_env_steps`` of all or ``stop``; return the last published weights of each.

    Where there are several they are updated in turn, each with its part of the same unrolls, but for one that comes in
    the middle of a round. Their schedules go by the steps of all.

    consumes: batches of trajectories     waits for: batch_size segments     unblocked by: the queue, ``stop``
    produces: a new version of every policy, again and again

    Raises:
        NonFiniteUpdate: ``max_skipped_updates`` updates of a policy in a row were skipped.
        CheckpointError, OSError: the last checkpoint could not be written.
        RuntimeError: the pool ended before the loop did.
        ObserverFailed: ``observer`` raised it; the last update is saved.
    """
    trained = [_Training(policy) for policy in policies]  # actors cannot start without weights
    saved_versions: list[int] | None = None
    last_due = -1
    failure: ObserverFailed | None = None
    while sum(each.env_steps for each in trained) < limits.total_env_steps and not stop.is_set():
        results = _update_all(trained, stop)
        made = [
            (policy.name, result)
            for policy, result in zip(policies, results, strict=False)
            if result is not None and isinstance(result.outcome, Trained)
        ]
        try:
            for name, result in made:
                observer.updated(name, result)
        except ObserverFailed as error:
            failure = error
            break
        if None in results:
            break
        every, version = limits.checkpoint_every, max(_versions(policies))
        # The policy with the highest version may wait there for a batch, while others make updates.
        is_due = every and version % every == 0 and version != last_due
        if made and (saving.asked.is_set() or is_due):
            saving.asked.clear()
            last_due = version
            saved_versions = _save(saving, policies, observer, required=False)
            for each in trained:
                each.write_if_due()
    for each in trained:
        each.faults.count()
    if saved_versions != _versions(policies):
        _save(saving, policies, observer, required=True)
    if failure:
        raise failure
    return [each.weights for each in trained]


def _update_all(trained: Sequence[_Training], stop: threading.Event) -> list[StepResult | None]:
    """One update of every policy; None, as the last, where ``stop`` was set while waiting for its batch.

    Once one policy was updated, ``stop`` leaves out none of the others whose part of these unrolls is there.
    """
    env_steps = sum(each.learner.env_steps for each in trained)
    for each in trained:
        each.learner.others_env_steps = env_steps - each.learner.env_steps
    results: list[StepResult | None] = []
    for each in trained:
        results.append(each.step(_NEVER if results and each.has_batch else stop))
        if results[-1] is None:
            break
    return results


_NEVER = threading.Event()


def _versions(policies: Sequence[TrainedPolicy]) -> list[int]:
    """Skipped updates, and batches without a transition, may have left some behind."""
    return [policy.learners.worker.learner.policy_version for policy in policies]


class _Training:
    """One policy in the loop."""

    def __init__(self, policy: TrainedPolicy) -> None:
        self._policy = policy
        worker = policy.learners.worker
        self.weights = worker.publish()
        policy.statistics.published_bytes += self.weights.flat.nbytes
        self._activations = ActivationSampler(worker.learner.policy)
        self._skipped_in_a_row = 0
        self.faults = RepeatedMessages("faults of environments", log)

    @property
    def learner(self) -> Learner:
        """The learner of the run's own process."""
        return self._policy.learners.worker.learner

    @property
    def has_batch(self) -> bool:
        """Whether the next update waits for nothing."""
        return self._policy.learners.worker.queue.has_batch()

    @property
    def env_steps(self) -> int:
        """Trained environment steps in the whole run."""
        return self._policy.learners.worker.queue.ledger.trained

    def step(self, stop: threading.Event) -> StepResult | None:
        """One update and what follows from its result; None where ``stop`` was set before it.

        Raises:
            NonFiniteUpdate: too many updates in a row were skipped.
        """
        learners, statistics = self._policy.learners, self._policy.statistics
        worker, learner = learners.worker, learners.worker.learner
        result = learners.step(stop)
        if result is None:
            return None
        assert worker.weights is not None
        self.weights = worker.weights
        statistics.published_bytes += self.weights.flat.nbytes
        self.faults.add(statistics.add_reports(result.reports))
        statistics.add_log_prob_errors(result.log_prob_errors)
        outcome = result.outcome
        if isinstance(outcome, Lost):
            steps = f"{result.ledger.sampled:,}"
            log.warning("%s; its %s steps are dropped and training goes on", outcome.error, steps)
        elif isinstance(outcome, Empty):
            statistics.add_empty_batch()
        elif isinstance(outcome, Skipped):
            self._skipped_in_a_row += 1
            statistics.skipped_updates += 1
            log.error("%san update was skipped: %s", self._policy.name and f"{self._policy.name}: ", outcome.error)
            self._policy.updates.write(learner, worker.recorder, learners.recorded)
            if self._skipped_in_a_row >= learner.config.max_skipped_updates:
                raise outcome.error
        else:
            self._skipped_in_a_row = 0
            statistics.add_update(learner.policy_version, outcome)
            every = learner.config.weight_metrics_every
            if every and (statistics.updates - 1) % every == 0:
                # Meanwhile the actors act with the new version.
                assert worker.batch is not None
                with worker.clock.time("weight_metrics"):
                    sampled = self._activations.sample(worker.batch)
                    statistics.weights = measure_weights(learner.regularizer, sampled)
        return result

    def write_if_due(self) -> None:
        """Write the recorded updates, with a checkpoint, if that is due."""
        worker, updates = self._policy.learners.worker, self._policy.updates
        if updates.is_due:
            with worker.clock.time("checkpoint"):
                updates.write(worker.learner, worker.recorder, self._policy.learners.recorded)


def _save(saving: Saving, policies: Sequence[TrainedPolicy], observer: Observer, *, required: bool) -> list[int] | None:
    """Save a checkpoint and return the versions in it.

    A failure is counted, and None returned; where the checkpoint is ``required``, it is raised.
    """
    versions = _versions(policies)
    with policies[0].learners.worker.clock.time("checkpoint"), saving.undisturbed():
        try:
            path = saving.write()
        except (OSError, CheckpointError) as error:
            if required:
                raise
            for policy in policies:
                policy.statistics.failed_checkpoints += 1
            log.error("checkpoint %d could not be written, training goes on: %s", max(versions), error)
            return None
    for policy in policies:
        policy.statistics.last_checkpoint_timestamp = time.time()
    observer.saved(path)
    return versions
