"""The metrics catalogue, and the page that Prometheus reads (``deploy.monitoring.metrics_server`` serves it).

Every metric is a line here: name, kind, help, label, and how it is read from the run when somebody scrapes. Nothing is
updated twice, and the training loop does no work for metrics.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from shoal.deploy.monitoring.bottleneck import STAGES, Bottleneck
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import Histogram, RunStatistics
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.learner.weight_metrics import WeightMetrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """What metrics are read from."""

    statistics: RunStatistics
    trajectory_queue: TrajectoryQueue
    actors_alive: Callable[[], int]
    actor_restarts: Callable[[], Mapping[str, int]]
    limit: Callable[[], Bottleneck | None]
    build: Mapping[str, str]
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What is run, and how, in words: few, and of bounded length."""
    actor_states: Callable[[], Mapping[str, int]] = dict
    """Actors by state, every state among them."""
    recoveries: Callable[[], int] = int
    """Replaced actors whose successors are up."""
    recovery_seconds: Callable[[], float] = float
    """What that took, summed up."""
    lags: Callable[[], Sequence[int]] = tuple
    """Of every unroll under way: versions made since it began."""
    accelerator_memory: Callable[[], Mapping[str, int]] = dict
    target_env_steps: int = 0
    """Of the whole run; it ends there."""
    run_dir: Path = Path()
    evaluations: Evaluations = dataclasses.field(default_factory=Evaluations)
    failed_readings: Counter[str] = dataclasses.field(default_factory=Counter)
    """Of the page's metrics, by name."""
    before: Ledger = dataclasses.field(default_factory=Ledger)
    """What the books of a resumed run began with: counters count this process, or they would go back with its start."""

    @property
    def ledger(self) -> Ledger:
        """The books."""
        return self.trajectory_queue.ledger

    @property
    def booked(self) -> Ledger:
        """What this process entered into them."""
        return self.trajectory_queue.snapshot().since(self.before)


Kind = Literal["counter", "gauge", "histogram"]
Read = Callable[[Sources], Any]
"""A number; a mapping from label value to number where there is a label; a ``Histogram``."""


@dataclasses.dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One metric."""

    kind: Kind
    name: str
    help: str
    read: Read
    label: str | None


def _counter(name: str, help: str, read: Read, label: str | None = None) -> CatalogueEntry:
    return CatalogueEntry("counter", f"shoal_{name}", help, read, label)


def _gauge(name: str, help: str, read: Read, label: str | None = None) -> CatalogueEntry:
    return CatalogueEntry("gauge", f"shoal_{name}", help, read, label)


def _weights(name: str, help: str, read: Callable[[WeightMetrics], Mapping[str, float]]) -> CatalogueEntry:
    return _gauge(name, help, lambda s: read(s.statistics.weights), "component")


def _histogram(name: str, help: str, read: Read) -> CatalogueEntry:
    return CatalogueEntry("histogram", f"shoal_{name}", help, read, None)


_ERROR = (
    "The parity check: largest difference between an actor's log-probabilities and the learner's for the same weights; "
    "above 1e-4 the memory is wrong"
)
_STALENESS = (
    "Distance of the LSTM states that segments begin with from those of the newest weights, over the latter's norm: as "
    "the actors stored them, and as training used them. At the last measurement."
)
_W0 = "the initial weights (or what learner.regularization.l2_init_reference_every made of them)"
_RANK = "Singular values that make up 0.99 of the sum of all; of several matrices the lowest."
_CONDITION = "Largest over smallest singular value; of several matrices the highest."
_DORMANT = "Share of a layer's units that hardly ever act: mean |activation| at most 0.025 of the layer's."
_STAGE = (
    "Seconds by stage; actor_policy, actor_env and actor_pack are summed over actors, the others are the run's own "
    "training loop's. Where learners also act, its wait is the time in which it makes its own unrolls, and reduce is "
    "the part of update in which gradients are added up and slower learners are waited for."
)
_DROPPED = (
    "Environment steps never to be trained: stale, came too late; non_finite, their update was refused; learner_lost, "
    "with a learner beside the run's own; shutdown, waiting when the run ended; restart, waiting when it was saved."
)
_LOSS = (
    "Of the last update: loss, policy_loss, value_loss, l2_init_loss, entropy, approx_kl, clip_fraction, grad_norm "
    "(before clipping) and explained_variance."
)
_REPLACED = (
    "Actors replaced: error, the environment raised; timeout, it hung; died, its process ended; oom, for want of "
    "memory; object_store, its node's is full; node_died; preempted, its node leaves."
)
_STALE = (
    "Actors at an unroll that began more than actor.max_policy_lag versions ago: it will come too late. Of learners "
    "beside the run's own as of the last update."
)
_SLOWEST = "Versions made since the oldest unroll under way began; 0 where none is."
_STATE = (
    "Actors by state: up, can make unrolls; starting; unplaced, waits for a place in the cluster or for its process to "
    "answer; pausing, failed and comes back after a pause. Of learners beside the run's own as of the last update."
)
_RECOVERY = "Seconds from noticing failures to the successors being up, summed up over shoal_actor_recoveries_total."
_ACCELERATOR = (
    "Memory of the accelerator of the run's own learner: allocated to tensors, reserved for them by torch, and in "
    "total. Absent on the CPU."
)

_EVALUATION = "Mean return of the last evaluation (evaluation.every_env_steps); NaN before."

CATALOGUE: tuple[CatalogueEntry, ...] = (
    # The books
    _counter("sampled_env_steps_total", "Environment steps delivered by actors.", lambda s: s.booked.sampled),
    _counter("trained_env_steps_total", "Environment steps used in updates.", lambda s: s.booked.trained),
    _counter("dropped_env_steps_total", _DROPPED, lambda s: s.booked.dropped, "reason"),
    _gauge("run_env_steps", "Environment steps trained in the whole run.", lambda s: s.ledger.trained),
    _gauge("target_env_steps", "Environment steps the whole run is to train.", lambda s: s.target_env_steps),
    _gauge("in_flight_env_steps", "Environment steps waiting for their update.", lambda s: s.ledger.in_flight),
    _gauge(
        "ledger_imbalance_env_steps",
        "sampled - trained - in flight - dropped: 0.",
        lambda s: s.trajectory_queue.imbalance(),
    ),
    # Trajectories
    _counter(
        "refused_trajectories_total", "Deliveries not in the books.", lambda s: s.trajectory_queue.refused, "reason"
    ),
    _counter("lost_unrolls_total", "Unrolls that ended with their actor.", lambda s: s.trajectory_queue.lost_unrolls),
    _gauge("queued_segments", "Segments waiting for their update.", lambda s: s.trajectory_queue.queued_segments),
    _gauge(
        "queued_bytes", "Bytes of trajectories waiting for their update.", lambda s: s.trajectory_queue.queued_bytes
    ),
    _counter("received_bytes_total", "Bytes taken into updates.", lambda s: s.statistics.received_bytes),
    _gauge("stale_actors", _STALE, lambda s: sum(lag > s.trajectory_queue.max_policy_lag for lag in s.lags())),
    _gauge("slowest_actor_lag_versions", _SLOWEST, lambda s: max(s.lags(), default=0)),
    _histogram("policy_lag_versions", "Versions from acting to training.", lambda s: s.statistics.policy_lag),
    # Updates
    _gauge("policy_version", "Updates in the whole run.", lambda s: s.statistics.policy_version),
    _counter("updates_total", "Updates made by this process.", lambda s: s.statistics.updates),
    _counter("skipped_updates_total", "Updates that were not finite.", lambda s: s.statistics.skipped_updates),
    _gauge(
        "last_update_timestamp_seconds", "Unix time of the last update.", lambda s: s.statistics.last_update_timestamp
    ),
    _counter("published_bytes_total", "Bytes of weights published.", lambda s: s.statistics.published_bytes),
    _gauge("loss", _LOSS, lambda s: s.statistics.terms, "term"),
    # Weights, by component; read every learner.weight_metrics_every updates
    _weights("weight_norm", "L2 norm of the parameters.", lambda w: w.norm),
    _weights("weight_distance_to_init", f"L2 distance of the parameters to {_W0}.", lambda w: w.distance_to_init),
    _weights(
        "weight_relative_distance_to_init", f"That over the norm of {_W0}.", lambda w: w.relative_distance_to_init
    ),
    _weights("weight_effective_rank", _RANK, lambda w: w.effective_rank),
    _weights("weight_condition_number", _CONDITION, lambda w: w.condition_number),
    _weights("weight_clipped_fraction", "Share of the clipped weights on their bound.", lambda w: w.clipped_fraction),
    _weights("dormant_units_ratio", _DORMANT, lambda w: w.dormant_units_ratio),
    # Memory
    _gauge("log_prob_error", f"{_ERROR}. At the last check.", lambda s: s.statistics.last_log_prob_error),
    _gauge("log_prob_error_max", f"{_ERROR}. In this run.", lambda s: s.statistics.max_log_prob_error),
    _counter("log_prob_checks_total", "Readings of the parity check.", lambda s: s.statistics.log_prob_checks),
    _gauge("memory_staleness_ratio", _STALENESS, lambda s: s.statistics.staleness, "state"),
    # Episodes, one per agent
    _counter(
        "sampled_episodes_total",
        "Episodes ended in what actors delivered.",
        lambda s: s.trajectory_queue.sampled_episodes,
    ),
    _counter("episodes_total", "Episodes ended in what updates took in.", lambda s: s.statistics.episodes),
    _histogram("episode_return", "Undiscounted returns of finished episodes.", lambda s: s.statistics.episode_return),
    _histogram("episode_length_steps", "Lengths of finished episodes.", lambda s: s.statistics.episode_length),
    _gauge("mean_return", "Mean of the last 256 returns; NaN before.", lambda s: _number(s.statistics.mean_return)),
    # Evaluation during training
    _gauge("evaluation_return", _EVALUATION, lambda s: _evaluated(s.evaluations.last)),
    _gauge(
        "evaluation_best_return", "The highest of all evaluations of the run.", lambda s: _evaluated(s.evaluations.best)
    ),
    _gauge("evaluation_env_steps", "Steps trained before the last evaluation.", lambda s: _evaluation_steps(s)),
    _counter("evaluations_total", "Evaluations made by this process.", lambda s: s.evaluations.count),
    _counter("failed_evaluations_total", "Evaluations begun and given up.", lambda s: s.evaluations.failed),
    # Actors
    _gauge("actors_alive", "Actors that can make unrolls.", lambda s: s.actors_alive()),
    _gauge("actors", _STATE, lambda s: s.actor_states(), "state"),
    _counter("actor_restarts_total", _REPLACED, lambda s: s.actor_restarts(), "reason"),
    _counter("actor_recoveries_total", "Replaced actors whose successors are up.", lambda s: s.recoveries()),
    _counter("actor_recovery_seconds_total", _RECOVERY, lambda s: s.recovery_seconds()),
    _counter("env_faults_total", "Environment slots restarted after a fault.", lambda s: s.statistics.env_faults),
    _counter("ignored_tokens_total", "Tokens that have no place.", lambda s: s.statistics.ignored_tokens),
    # The bottleneck
    _gauge("limit", "1 for what limits the run now, 0 for the others.", lambda s: _limit(s), "stage"),
    # The process
    _counter("stage_seconds_total", _STAGE, lambda s: s.statistics.stage_seconds, "stage"),
    _counter("failed_checkpoints_total", "Checkpoints not written.", lambda s: s.statistics.failed_checkpoints),
    _gauge(
        "last_checkpoint_timestamp_seconds",
        "Unix time of the last checkpoint.",
        lambda s: s.statistics.last_checkpoint_timestamp,
    ),
    _gauge("run_dir_free_bytes", "Bytes left on the disk of run_dir.", lambda s: shutil.disk_usage(s.run_dir).free),
    _gauge("run_dir_size_bytes", "Size in bytes of the disk of run_dir.", lambda s: shutil.disk_usage(s.run_dir).total),
    _gauge("accelerator_memory_bytes", _ACCELERATOR, lambda s: s.accelerator_memory(), "part"),
    # The last: it has the failures of this very page.
    _counter("failed_readings_total", "Readings of a metric that failed.", lambda s: s.failed_readings, "metric"),
)
INFO: Mapping[str, tuple[str, Callable[[Sources], Mapping[str, str]]]] = {
    "shoal_build_info": ("Versions; always 1.", lambda s: s.build),
    "shoal_run_info": ("What is run, and how; always 1.", lambda s: s.about),
}
"""Words about the run, as labels of gauges that are always 1: a help text and where they come from."""


class RunCollector(Collector):
    """Renders the catalogue at every scrape; an entry that fails costs itself, not the page."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """One family per entry."""
        for entry in CATALOGUE:
            try:
                yield _family(entry, entry.read(self._sources))
            except Exception:
                self._sources.failed_readings[entry.name] += 1
                if self._sources.failed_readings[entry.name] == 1:
                    log.exception("metric %s cannot be read", entry.name)
        for name, (help, read) in INFO.items():
            words = read(self._sources)
            info = GaugeMetricFamily(name, help, labels=list(words))
            info.add_metric(list(words.values()), 1)
            yield info

    def describe(self) -> list[Metric]:
        """Nothing, so that registering reads no values."""
        return []


def _family(entry: CatalogueEntry, value: Any) -> Metric:
    if isinstance(value, Histogram):
        histogram = HistogramMetricFamily(entry.name, entry.help)
        bounds = (*(str(float(bound)) for bound in value.bounds), "+Inf")
        histogram.add_metric([], list(zip(bounds, accumulate(value.counts), strict=True)), value.sum)
        return histogram
    cls = CounterMetricFamily if entry.kind == "counter" else GaugeMetricFamily
    family = cls(entry.name, entry.help, labels=[entry.label] if entry.label else [])
    # dict: a copy, because the training loop may add a label meanwhile.
    for labels, number in [([label], n) for label, n in dict(value).items()] if entry.label else [([], value)]:
        family.add_metric(labels, number)
    return family


def _limit(sources: Sources) -> dict[str, int]:
    bottleneck = sources.limit()
    return {stage: int(bottleneck is not None and bottleneck.stage == stage) for stage in STAGES}


def _evaluated(result: EvaluationResult | None) -> float:
    return float("nan") if result is None else result.mean_return


def _evaluation_steps(sources: Sources) -> float:
    last = sources.evaluations.last
    return float("nan") if last is None else last.env_steps


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def make_registry(sources: Sources) -> CollectorRegistry:
    """The whole page: the catalogue, and Python's own metrics of this process."""
    registry = CollectorRegistry()
    registry.register(RunCollector(sources))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
