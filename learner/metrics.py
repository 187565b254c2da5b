"""The metrics catalogue and its Prometheus endpoint.

Every metric is a line here: name, kind, help, label, and how it is read from the run when somebody scrapes. Nothing is
updated twice, and the training loop does no work for metrics.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.intake import Intake
from learner.ledger import Ledger
from learner.statistics import Histogram, RunStatistics
from learner.verdict import STAGES, Verdict
from learner.weight_metrics import WeightMetrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """What metrics are read from."""

    statistics: RunStatistics
    intake: Intake
    actors_alive: Callable[[], int]
    actor_restarts: Callable[[], Mapping[str, int]]
    limit: Callable[[], Verdict | None]
    build: Mapping[str, str]
    before: Ledger = dataclasses.field(default_factory=Ledger)
    """What the books of a resumed run began with: counters count this process, or they would go back with its start."""

    @property
    def ledger(self) -> Ledger:
        """The books."""
        return self.intake.ledger

    @property
    def booked(self) -> Ledger:
        """What this process entered into them."""
        return self.intake.books().since(self.before)


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
    "The canary: largest difference between an actor's log-probabilities and the learner's for the same weights; "
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

CATALOGUE: tuple[CatalogueEntry, ...] = (
    # The books
    _counter("sampled_env_steps_total", "Environment steps delivered by actors.", lambda s: s.booked.sampled),
    _counter("trained_env_steps_total", "Environment steps used in updates.", lambda s: s.booked.trained),
    _counter("dropped_env_steps_total", "Environment steps never to be trained.", lambda s: s.booked.dropped, "reason"),
    _gauge("in_flight_env_steps", "Environment steps waiting for their update.", lambda s: s.ledger.in_flight),
    _gauge("ledger_imbalance_env_steps", "sampled - trained - in flight - dropped: 0.", lambda s: s.intake.imbalance()),
    # Trajectories
    _counter("refused_trajectories_total", "Deliveries not in the books.", lambda s: s.intake.refused, "reason"),
    _counter("lost_unrolls_total", "Unrolls started and never delivered.", lambda s: s.intake.lost_unrolls),
    _gauge("queued_segments", "Segments waiting for their update.", lambda s: s.intake.queued_segments),
    _gauge("queued_bytes", "Bytes of trajectories waiting for their update.", lambda s: s.intake.queued_bytes),
    _counter("received_bytes_total", "Bytes taken into updates.", lambda s: s.statistics.received_bytes),
    _histogram("policy_lag_versions", "Versions from acting to training.", lambda s: s.statistics.policy_lag),
    # Updates
    _gauge("policy_version", "Updates in the whole run.", lambda s: s.statistics.policy_version),
    _counter("updates_total", "Updates made by this process.", lambda s: s.statistics.updates),
    _counter("refused_updates_total", "Updates that were not finite.", lambda s: s.statistics.refused_updates),
    _gauge("last_update_timestamp_seconds", "Unix time of it.", lambda s: s.statistics.last_update_timestamp),
    _counter("published_bytes_total", "Bytes of weights published.", lambda s: s.statistics.published_bytes),
    _gauge("loss", "Losses and diagnostics of the last update.", lambda s: s.statistics.terms, "term"),
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
    _counter("log_prob_checks_total", "Readings of the canary.", lambda s: s.statistics.log_prob_checks),
    _gauge("memory_staleness_ratio", _STALENESS, lambda s: s.statistics.staleness, "state"),
    # Episodes, one per agent
    _counter("episodes_total", "Finished episodes.", lambda s: s.statistics.episodes),
    _histogram("episode_return", "Undiscounted returns of finished episodes.", lambda s: s.statistics.episode_return),
    _histogram("episode_length_steps", "Lengths of finished episodes.", lambda s: s.statistics.episode_length),
    _gauge("mean_return", "Mean of the last 256 returns; NaN before.", lambda s: _number(s.statistics.mean_return)),
    # Actors
    _gauge("actors_alive", "Actors that can make unrolls.", lambda s: s.actors_alive()),
    _counter("actor_restarts_total", "Actors replaced.", lambda s: s.actor_restarts(), "reason"),
    _counter("env_faults_total", "Environment slots restarted after a fault.", lambda s: s.statistics.env_faults),
    _counter("ignored_tokens_total", "Tokens that have no place.", lambda s: s.statistics.ignored_tokens),
    # The verdict
    _gauge("limit", "1 for what limits the run now, 0 for the others.", lambda s: _limit(s), "stage"),
    # The process
    _counter("stage_seconds_total", _STAGE, lambda s: s.statistics.stage_seconds, "stage"),
    _counter("failed_checkpoints_total", "Checkpoints not written.", lambda s: s.statistics.failed_checkpoints),
    _gauge("last_checkpoint_timestamp_seconds", "Unix time of it.", lambda s: s.statistics.last_checkpoint_timestamp),
)


class RunCollector(Collector):
    """Renders the catalogue at every scrape; an entry that fails costs itself, not the page."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._reported: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """One family per entry."""
        for entry in CATALOGUE:
            try:
                yield _family(entry, entry.read(self._sources))
            except Exception:
                if entry.name not in self._reported:
                    self._reported.add(entry.name)
                    log.exception("metric %s cannot be read", entry.name)
        info = GaugeMetricFamily("shoal_build_info", "Versions; always 1.", labels=list(self._sources.build))
        info.add_metric(list(self._sources.build.values()), 1)
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
    verdict = sources.limit()
    return {stage: int(verdict is not None and verdict.stage == stage) for stage in STAGES}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


class MetricsServer:
    """The endpoint, on localhost unless asked otherwise.

    Raises:
        OSError: the port is taken or the address is not this machine's.
    """

    def __init__(self, sources: Sources, *, address: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(RunCollector(sources))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        self.port: int = self._server.server_port
        self.url = f"http://{address}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
