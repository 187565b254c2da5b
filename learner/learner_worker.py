"""The learner worker: one learner with its trajectory queue, and its part in one update.

It waits for segments, assembles a batch, checks it, updates, counts the steps and publishes the weights. The run's own
process has one; so has the process of every peer learner.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from shoal.learner.batch import BatchAssembler
from shoal.learner.group import LearnerLost
from shoal.learner.learner import Learner, NonFiniteUpdate
from shoal.learner.ledger import DropReason, Ledger
from shoal.learner.opponents import OpponentPool
from shoal.learner.parity_check import LogProbParityCheck
from shoal.learner.recorder import Recorder
from shoal.learner.schedules import ScheduledSettings
from shoal.learner.statistics import StageClock, TrajectoryReport, report_trajectories
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import Trajectory
from shoal.policy.weights import Weights, flatten_weights
from tensordict import TensorDict

NEVER = threading.Event()
"""An event that is never set: a learner that others wait for does not stop in an update."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The update was made."""

    all_env_steps: int
    """Environment steps that it trained, over all learners."""
    terms: dict[str, float]
    """``UpdateResult.terms``."""
    optimizer_steps: int
    """Optimizer steps made, the same in all learners."""
    scheduled: ScheduledSettings
    """The values that it was made with."""
    staleness: dict[str, float]
    """``UpdateResult.staleness``."""
    gradient_norms: dict[str, float]
    """``UpdateResult.gradient_norms``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Loss or gradient was not finite: the update was skipped, and the weights are as before."""

    error: NonFiniteUpdate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """Another learner of the group ended or hangs: no update was made, and the weights are as before."""

    error: LearnerLost


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Empty:
    """The batch has no transition, because all agents of the policy were out of their games: no update was made."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of one update with one batch; plain data that may cross processes."""

    outcome: Trained | Skipped | Lost | Empty
    ledger: Ledger
    """The steps of the batch, as trained or dropped; none is in flight."""
    reports: tuple[TrajectoryReport, ...]
    """One for each trajectory of the batch."""
    log_prob_errors: tuple[float, ...]
    """Readings of the log-prob parity check."""
    weights_hash: str
    """Hash of the weights after the step."""


def not_finite(policy_version: int) -> str:
    """Why an update whose numbers were finite has failed nevertheless."""
    return f"the weights of policy version {policy_version} are not finite; they are not published"


@dataclasses.dataclass(kw_only=True, slots=True)
class LearnerWorker:
    """A learner with its queue, assembler, parity check, clock and recorder."""

    learner: Learner
    queue: TrajectoryQueue
    assembler: BatchAssembler
    publish_to: Callable[[Weights], Any]
    """Turns weights into the form in which the pool passes them to its workers."""
    parity_check: LogProbParityCheck
    clock: StageClock
    recorder: Recorder
    weights: Weights | None = None
    """The last published ones."""
    batch: TensorDict | None = None
    """The last trained batch."""
    opponents: OpponentPool | None = None
    """The versions that self-play games are played against; None without self-play."""
    env_options: Mapping[str, Any] | None = None
    """Options of the environments' episodes, which go with every published version (``Weights.env_options``)."""
    first_options: Mapping[str, Any] | None = None
    """Those of the first version that is published, empty for none; None where they are ``env_options``. A resumed run
    publishes a version again, with the options that it had."""

    def step(self, drive: Callable[[float], None] | None, stop: threading.Event) -> StepResult | None:
        """One update with one batch; None where ``stop`` was set while waiting for it.

        consumes: batch_size segments     waits for: the actors, and the other learners of the group
        produces: a new policy version     unblocked by: the queue, ``stop``

        ``drive`` makes the data where no other thread does.

        Raises:
            NonFiniteUpdate: the new weights are not finite.
            RuntimeError: the pool ended.
        """
        learner, clock = self.learner, self.clock
        version = learner.policy_version
        with clock.time("wait"):
            trajectories = self.queue.next_batch(drive, stop)
        if trajectories is None:
            return None
        if not learner.group and not any(trajectory.env_steps for trajectory in trajectories):
            # The optimizer would step by its momentum alone.
            return self._without_update(trajectories, [], Empty())
        with clock.time("assemble"):
            batch = learner.path.to_device(self.assembler.assemble(trajectories))
        with clock.time("parity_check"):
            errors = [self.parity_check.check(batch)]
        assert self.weights is not None
        try:
            with clock.time("update"):
                self.recorder.begin(learner, batch)
                result = learner.update(batch)
        except NonFiniteUpdate as error:
            self.recorder.not_made("skipped", str(error), self.weights.content_hash)
            return self._without_update(trajectories, errors, Skipped(error=error), "non_finite")
        except LearnerLost as error:
            self.recorder.forget()
            return self._without_update(trajectories, errors, Lost(error=error), "learner_lost")
        except Exception as error:
            self.recorder.not_made("failed", f"{type(error).__name__}: {error}")
            raise
        if learner.group:
            clock.seconds["reduce"] += learner.group.seconds
            learner.group.seconds = 0.0
        self.batch = batch
        ledger = self.queue.book(trajectories, trained=result.env_steps)
        if self.opponents is not None:
            self.opponents.add_games(trajectories)
        with clock.time("publish"):
            try:
                weights = self.publish()
            except NonFiniteUpdate as error:
                self.recorder.not_made("failed", str(error))
                raise
        self.recorder.made(weights.content_hash, result.terms)
        return StepResult(
            outcome=Trained(
                all_env_steps=result.all_env_steps,
                terms=result.terms,
                optimizer_steps=result.optimizer_steps,
                scheduled=result.scheduled,
                staleness=result.staleness,
                gradient_norms=result.gradient_norms,
            ),
            ledger=ledger,
            reports=report_trajectories(trajectories, version),
            log_prob_errors=_readings([*errors, result.log_prob_error]),
            weights_hash=weights.content_hash,
        )

    def publish(self) -> Weights:
        """Offer the learner's weights to the actors.

        Raises:
            NonFiniteUpdate: they are not finite.
        """
        weights = flatten_weights(self.learner.policy, self.learner.policy_version)
        if not np.isfinite(weights.flat).all():
            raise NonFiniteUpdate(not_finite(weights.policy_version))
        options = self.env_options
        if self.first_options is not None:
            options, self.first_options = self.first_options or None, None
        if options is not None:
            weights = dataclasses.replace(weights, env_options=options)
        self.parity_check.remember(weights)
        self._publish(weights)
        return weights

    def _publish(self, weights: Weights) -> None:
        self.weights = weights
        if self.opponents is not None:
            weights = self.opponents.publish(weights, self.publish_to)
        self.queue.publish(weights.policy_version, self.publish_to(weights))

    def _without_update(
        self,
        trajectories: list[Trajectory],
        errors: list[float | None],
        outcome: Skipped | Lost | Empty,
        reason: DropReason | None = None,
    ) -> StepResult:
        """Drop the batch and publish the weights again: the actors go on with them."""
        assert self.weights is not None
        ledger = self.queue.book(trajectories, trained=0, dropped=reason)
        self._publish(self.weights)
        return StepResult(
            outcome=outcome,
            ledger=ledger,
            reports=report_trajectories(trajectories, self.weights.policy_version),
            log_prob_errors=_readings(errors),
            weights_hash=self.weights.content_hash,
        )


def _readings(errors: list[float | None]) -> tuple[float, ...]:
    return tuple(error for error in errors if error is not None)
