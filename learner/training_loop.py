"""The training loop: the only finite loop. When it returns, whoever runs it closes the pool."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from shoal.learner.activations import ActivationSampler
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.ledger import Ledger
from shoal.learner.peer_learners import Peers
from shoal.learner.statistics import RunStatistics
from shoal.learner.update_step import NEVER, StepResult, UpdateLoop, reconcile
from shoal.learner.weight_metrics import measure_weights
from shoal.policy.weights import Weights

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When training ends and how often it is saved."""

    total_env_steps: int
    """Trained environment steps, those of the runs it resumes included."""
    checkpoint_every: int
    """Updates between checkpoints; 0 saves only at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What training works with; each is owned by whoever built it."""

    loop: UpdateLoop
    checkpoints: Checkpoints
    describe: Callable[[], Mapping[str, Any]]
    """The run's state beside the weights, for checkpoints."""
    peers: Peers | None = None
    """Learners that make the updates together with this one."""


def train(parts: Parts, limits: Limits, drive: Callable[[float], None] | None, stop: threading.Event) -> Weights:
    """Update the policy until total_env_steps or ``stop``; the last published weights.

    consumes: batches of trajectories     waits for: batch_size segments     unblocked by: the queue, ``stop``
    produces: a new policy version every update

    Raises:
        NonFiniteUpdate: ``max_skipped_updates`` in a row.
        RuntimeError: the pool ended before the loop did.
    """
    loop = parts.loop
    learner, statistics, ledger = loop.learner, loop.statistics, loop.trajectory_queue.ledger
    weights = loop.publish()  # actors cannot start without one
    activations = ActivationSampler(learner.policy)
    refused = 0
    saved_version = -1
    while ledger.trained < limits.total_env_steps and not stop.is_set():
        if parts.peers:
            parts.peers.begin(learner, stop)
        # Whoever has begun is waited for by the others.
        turn = loop.turn(drive, NEVER if parts.peers else stop)
        if turn is None:
            break
        _take_in(statistics, turn)
        if parts.peers:
            _add_peers(parts, parts.peers, turn)
        if turn.lost:
            log.warning("%s; its %s steps are dropped and training goes on", turn.lost, f"{turn.books.sampled:,}")
            continue
        if turn.refused:
            refused += 1
            statistics.skipped_updates += 1
            if refused >= learner.config.max_skipped_updates:
                raise turn.refused
            continue
        refused = 0
        assert loop.weights is not None
        weights = loop.weights
        statistics.policy_version = learner.policy_version
        statistics.updates += 1
        statistics.terms = turn.terms
        statistics.staleness.update(turn.staleness)
        statistics.stamp_update()
        _measure_weights(loop, activations)
        if limits.checkpoint_every and learner.policy_version % limits.checkpoint_every == 0:
            saved_version = _save(parts, required=False)
    if saved_version != learner.policy_version:
        _save(parts, required=True)
    return weights


def _take_in(statistics: RunStatistics, turn: StepResult) -> None:
    for message in statistics.add_batch(turn.trajectories):
        log.warning("%s", message)
    for error in turn.log_prob_errors:
        statistics.add_log_prob_error(error)


def _add_peers(parts: Parts, peers: Peers, own: StepResult) -> None:
    """Enter what the other learners did in this turn."""
    loop = parts.loop
    if own.lost:
        peers.separate(loop.learner)
    trained = own.books.trained
    for turn in peers.end():
        _take_in(loop.statistics, turn)
        books = reconcile(own, turn)
        loop.trajectory_queue.add_books(books)
        loop.trajectory_queue.add_books(turn.beside)
        loop.trajectory_queue.count_episodes(turn.trajectories)
        loop.trajectory_queue.count_lost(turn.lost_unrolls)
        trained += books.trained
        if not own.lost and (turn.lost or turn.weights_hash != own.weights_hash):
            if not turn.lost:
                log.error("two learners made different weights of one update; the run's own count from here on")
            peers.separate(loop.learner)
    if missing := own.all_env_steps - trained:
        # A learner that ended between the update and its answer: its steps were trained all the same.
        loop.trajectory_queue.add_books(Ledger(sampled=missing, trained=missing))


def _measure_weights(loop: UpdateLoop, activations: ActivationSampler) -> None:
    """After the first update and every ``weight_metrics_every`` more, while actors already act with the new version."""
    learner, statistics = loop.learner, loop.statistics
    every = learner.config.weight_metrics_every
    if every and (statistics.updates - 1) % every == 0:
        assert loop.batch is not None
        with statistics.time("weight_metrics"):
            statistics.weights = measure_weights(learner.regularizer, activations.sample(loop.batch))


def _save(parts: Parts, *, required: bool) -> int:
    """Save a checkpoint; one that fails in mid-run is counted and training goes on, the last one must succeed."""
    learner, statistics = parts.loop.learner, parts.loop.statistics
    with statistics.time("checkpoint"):
        try:
            parts.checkpoints.save(learner, parts.describe())
        except OSError as error:
            if required:
                raise
            statistics.failed_checkpoints += 1
            log.error("checkpoint %d could not be written, training goes on: %s", learner.policy_version, error)
            return -1
    statistics.last_checkpoint_timestamp = time.time()
    return learner.policy_version
