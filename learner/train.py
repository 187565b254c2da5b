"""The training loop: the only finite loop. When it returns, whoever runs it closes the pool."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from learner.activations import ActivationSampler
from learner.batch import BatchAssembler
from learner.canary import Canary
from learner.checkpoint import Checkpoints
from learner.intake import Intake
from learner.learner import Learner, NonFiniteUpdate
from learner.statistics import RunStatistics
from learner.weight_metrics import measure_weights
from policy.weights import Weights, flatten_weights

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When training ends and how often it is saved."""

    total_env_steps: int
    """Trained environment steps, those of the runs it resumes included."""
    max_seconds: float
    """Wall seconds of this process; 0 is no limit."""
    checkpoint_every: int
    """Updates between checkpoints; 0 saves only at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop works with; each is owned by whoever built it."""

    learner: Learner
    intake: Intake
    assembler: BatchAssembler
    publish: Callable[[Weights], Any]
    """Turns weights into what the pool passes to its workers."""
    canary: Canary
    checkpoints: Checkpoints
    statistics: RunStatistics
    refused_dir: Path
    """Where batches whose update was refused are kept for inspection."""
    describe: Callable[[], Mapping[str, Any]]
    """The run's state beside the weights, for checkpoints."""


def train(parts: Parts, limits: Limits, drive: Callable[[float], None] | None, stop: threading.Event) -> Weights:
    """Update the policy until total_env_steps, max_seconds or ``stop``; the last published weights.

    consumes: batches of trajectories     waits for: batch_size segments     unblocked by: the intake, ``stop``
    produces: a new policy version every update

    Raises:
        NonFiniteUpdate: ``max_refused_updates`` in a row.
        RuntimeError: the pool ended before the loop did.
    """
    learner, intake, statistics = parts.learner, parts.intake, parts.statistics
    weights = _publish(parts)  # actors cannot start without one
    activations = ActivationSampler(learner.policy)
    refused = 0
    saved_version = -1
    while intake.ledger.trained < limits.total_env_steps and not _out_of_time(limits, statistics):
        with statistics.time("wait"):
            trajectories = intake.next_batch(drive, stop)
        if trajectories is None:
            break
        with statistics.time("assemble"):
            batch = learner.path.to_device(parts.assembler.assemble(trajectories))
        for message in statistics.add_batch(trajectories):
            log.warning("%s", message)
        with statistics.time("canary"):
            statistics.add_log_prob_error(parts.canary.check(batch))
        try:
            with statistics.time("update"):
                result = learner.update(batch)
        except NonFiniteUpdate as error:
            refused += 1
            _refuse(parts, batch, error)
            intake.book(trajectories, trained=0, dropped="non_finite")
            if refused >= learner.config.max_refused_updates:
                raise
            intake.publish(learner.policy_version, parts.publish(weights))
            continue
        refused = 0
        intake.book(trajectories, trained=result.env_steps)
        statistics.staleness.update(result.staleness)
        _record(statistics, result.terms, result.log_prob_error)
        with statistics.time("publish"):
            weights = _publish(parts)
        _measure_weights(parts, activations, batch)
        if limits.checkpoint_every and learner.policy_version % limits.checkpoint_every == 0:
            saved_version = _save(parts, required=False)
    if saved_version != learner.policy_version:
        _save(parts, required=True)
    return weights


def _publish(parts: Parts) -> Weights:
    weights = flatten_weights(parts.learner.policy, parts.learner.policy_version)
    if not np.isfinite(weights.flat).all():
        raise NonFiniteUpdate(
            f"the weights of policy version {weights.policy_version} are not finite; they are not published"
        )
    parts.canary.remember(weights)
    parts.statistics.published_bytes += weights.flat.nbytes
    parts.statistics.policy_version = weights.policy_version
    parts.intake.publish(weights.policy_version, parts.publish(weights))
    return weights


def _record(statistics: RunStatistics, terms: dict[str, float], error: float | None) -> None:
    statistics.updates += 1
    statistics.terms = terms
    statistics.last_update_timestamp = time.time()
    statistics.add_log_prob_error(error)


def _measure_weights(parts: Parts, activations: ActivationSampler, batch: TensorDict) -> None:
    """After the first update and every ``weight_metrics_every`` more, while actors already act with the new version."""
    learner, statistics = parts.learner, parts.statistics
    every = learner.config.weight_metrics_every
    if every and (statistics.updates - 1) % every == 0:
        with statistics.time("weight_metrics"):
            statistics.weights = measure_weights(learner.regularizer, activations.sample(batch))


def _refuse(parts: Parts, batch: TensorDict, error: NonFiniteUpdate) -> None:
    """Keep the batch of a refused update; weights and optimizer are as before it."""
    parts.statistics.refused_updates += 1
    parts.refused_dir.mkdir(parents=True, exist_ok=True)
    path = parts.refused_dir / f"batch-{parts.learner.policy_version:09d}-{parts.statistics.refused_updates}.pt"
    torch.save(dict(batch.cpu().items()), path)
    log.error("an update was refused and its batch saved to %s: %s", path, error)


def _save(parts: Parts, *, required: bool) -> int:
    """Save a checkpoint; one that fails in mid-run is counted and training goes on, the last one must succeed."""
    with parts.statistics.time("checkpoint"):
        try:
            parts.checkpoints.save(parts.learner, parts.describe())
        except OSError as error:
            if required:
                raise
            parts.statistics.failed_checkpoints += 1
            log.error("checkpoint %d could not be written, training goes on: %s", parts.learner.policy_version, error)
            return -1
    parts.statistics.last_checkpoint_timestamp = time.time()
    return parts.learner.policy_version


def _out_of_time(limits: Limits, statistics: RunStatistics) -> bool:
    return 0 < limits.max_seconds <= statistics.seconds
