"""Measures acting and learning of a run for some seconds in this process."""

from __future__ import annotations

import dataclasses
import time

import torch
from shoal.actors.pool import InlinePool
from shoal.deploy.placement.layout import Layout
from shoal.deploy.placement.setups import make_learner_setup, make_worker_setup
from shoal.deploy.settings.sections import Config
from shoal.envs.registry import make_env_spec
from shoal.learner.learner_worker import NEVER, LearnerWorker
from shoal.learner.statistics import RunStatistics, TimedStage
from shoal.policy.allocator import keep_freed_memory

MEASURED_SECONDS = 8.0
_ACTING: tuple[TimedStage, ...] = ("actor_env", "actor_policy", "actor_pack")
_LEARNING: tuple[TimedStage, ...] = ("assemble", "parity_check", "update", "publish")


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Seconds per environment step of one process while the others rest."""

    acting: float
    """Environment, inference and packing."""
    environment: float
    """Part of ``acting`` spent in the environment."""
    learning: float
    """Assembling, updating and publishing."""


def measure(config: Config, layout: Layout) -> Measured:
    """One learner's share of the batch, made by one rollout worker and trained, over and over; nothing is kept."""
    torch.set_num_threads(1)
    keep_freed_memory()
    spec = make_env_spec(config.env.id, config.env.options, **config.env.kwargs)
    share = dataclasses.replace(layout.share(0), actors=range(1))
    worker = make_worker_setup(config, spec, run_id="measured")
    setup = make_learner_setup(config, layout, worker, spec)
    learner = setup.make_learner_worker(share)
    ledger = learner.queue.ledger
    statistics = RunStatistics(ledger, learner.clock)
    pool = setup.make_pool(share, learner.queue)
    try:
        learner.publish()
        _step(learner, pool, statistics)  # which compiles and allocates
        stages, trained = dict(statistics.stage_seconds), ledger.trained
        end = time.perf_counter() + MEASURED_SECONDS
        while time.perf_counter() < end:
            _step(learner, pool, statistics)
    finally:
        pool.close()
        learner.learner.close()
    steps = ledger.trained - trained
    spent = {stage: (seconds - stages.get(stage, 0.0)) / steps for stage, seconds in statistics.stage_seconds.items()}
    return Measured(
        acting=sum(spent[stage] for stage in _ACTING),
        environment=spent["actor_env"],
        learning=sum(spent[stage] for stage in _LEARNING),
    )


def _step(learner: LearnerWorker, pool: InlinePool, statistics: RunStatistics) -> None:
    result = learner.step(pool.pump, NEVER)
    assert result is not None
    statistics.add_reports(result.reports)
