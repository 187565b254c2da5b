"""The metrics catalogue and its Prometheus endpoint.

Every metric is a line here: name, kind, help, label, and how it is read from the run when somebody scrapes. Nothing is
updated twice, and the training loop does no work for metrics.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.intake import Intake
from learner.statistics import Histogram, RunStatistics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """What metrics are read from."""

    statistics: RunStatistics
    intake: Intake
    actors_alive: Callable[[], int]
    actor_restarts: Callable[[], Mapping[str, int]]
    build: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One metric."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Sources], Any]
    """A number; a mapping from label value to number where ``label`` is set; a ``Histogram``."""
    label: str | None = None


def _entry(
    name: str,
    kind: Literal["counter", "gauge", "histogram"],
    help: str,
    read: Callable[[Sources], Any],
    label: str | None = None,
) -> CatalogueEntry:
    return CatalogueEntry(f"shoal_{name}", kind, help, read, label)


CATALOGUE: tuple[CatalogueEntry, ...] = (
    _entry(
        "sampled_env_steps_total",
        "counter",
        "Environment steps delivered by actors.",
        lambda s: s.intake.ledger.sampled,
    ),
    _entry(
        "trained_env_steps_total", "counter", "Environment steps used in updates.", lambda s: s.intake.ledger.trained
    ),
    _entry(
        "dropped_env_steps_total",
        "counter",
        "Environment steps that will not be trained, by reason.",
        lambda s: s.intake.ledger.dropped,
        "reason",
    ),
    _entry(
        "in_flight_env_steps",
        "gauge",
        "Environment steps delivered and waiting for their update.",
        lambda s: s.intake.ledger.in_flight,
    ),
    _entry(
        "ledger_imbalance_env_steps",
        "gauge",
        "sampled - trained - in flight - dropped; 0 when the books balance.",
        lambda s: s.intake.ledger.balance(),
    ),
    _entry(
        "refused_trajectories_total",
        "counter",
        "Deliveries that are not in the books, by reason.",
        lambda s: s.intake.refused,
        "reason",
    ),
    _entry(
        "lost_unrolls_total",
        "counter",
        "Unrolls that were started and never delivered.",
        lambda s: s.intake.lost_unrolls,
    ),
    _entry("queued_segments", "gauge", "Segments waiting for their update.", lambda s: s.intake.queued_segments),
    _entry(
        "queued_bytes",
        "gauge",
        "Bytes of the trajectories that wait for their update.",
        lambda s: s.intake.queued_bytes,
    ),
    _entry(
        "received_bytes_total",
        "counter",
        "Bytes of trajectories taken into updates.",
        lambda s: s.statistics.received_bytes,
    ),
    _entry("published_bytes_total", "counter", "Bytes of weights published.", lambda s: s.statistics.published_bytes),
    _entry("updates_total", "counter", "Updates made by this process.", lambda s: s.statistics.updates),
    _entry(
        "refused_updates_total",
        "counter",
        "Updates refused because a loss or gradient was not finite.",
        lambda s: s.statistics.refused_updates,
    ),
    _entry(
        "policy_version",
        "gauge",
        "Updates made in the whole run; the version of the newest weights.",
        lambda s: s.statistics.policy_version,
    ),
    _entry(
        "policy_lag_versions",
        "histogram",
        "Versions between acting and training, per trajectory.",
        lambda s: s.statistics.policy_lag,
    ),
    _entry(
        "log_prob_error",
        "gauge",
        "The canary: largest difference between an actor's and the learner's "
        "log-probabilities for the same weights, at the last check. Above 1e-4 the memory is wrong.",
        lambda s: s.statistics.last_log_prob_error,
    ),
    _entry(
        "log_prob_error_max",
        "gauge",
        "The canary's largest reading in this run.",
        lambda s: s.statistics.max_log_prob_error,
    ),
    _entry("log_prob_checks_total", "counter", "Readings of the canary.", lambda s: s.statistics.log_prob_checks),
    _entry(
        "episode_return",
        "histogram",
        "Undiscounted returns of finished episodes, one per agent.",
        lambda s: s.statistics.episode_return,
    ),
    _entry("episode_length_steps", "histogram", "Lengths of finished episodes.", lambda s: s.statistics.episode_length),
    _entry(
        "mean_return",
        "gauge",
        "Mean return of the last 256 finished episodes.",
        lambda s: float("nan") if s.statistics.mean_return is None else s.statistics.mean_return,
    ),
    _entry(
        "loss",
        "gauge",
        "Parts of the loss and diagnostics of the last update, by term.",
        lambda s: s.statistics.terms,
        "term",
    ),
    _entry(
        "weight",
        "gauge",
        "State of the weights after the last update: distance to their initial values and the "
        "clipped fraction, by feature.",
        lambda s: s.statistics.weights,
        "feature",
    ),
    _entry(
        "stage_seconds_total",
        "counter",
        "Seconds by stage: actor_policy and actor_env are summed over actors, the others are the training loop's.",
        lambda s: s.statistics.stage_seconds,
        "stage",
    ),
    _entry("actors_alive", "gauge", "Actors that can make unrolls.", lambda s: s.actors_alive()),
    _entry("actor_restarts_total", "counter", "Actors replaced, by reason.", lambda s: s.actor_restarts(), "reason"),
    _entry(
        "env_faults_total", "counter", "Environment slots restarted after a fault.", lambda s: s.statistics.env_faults
    ),
    _entry(
        "ignored_tokens_total",
        "counter",
        "Observation tokens outside the window or of unknown features.",
        lambda s: s.statistics.ignored_tokens,
    ),
    _entry(
        "failed_checkpoints_total",
        "counter",
        "Checkpoints that could not be written.",
        lambda s: s.statistics.failed_checkpoints,
    ),
    _entry(
        "last_update_timestamp_seconds",
        "gauge",
        "Unix time of the last update.",
        lambda s: s.statistics.last_update_timestamp,
    ),
    _entry(
        "last_checkpoint_timestamp_seconds",
        "gauge",
        "Unix time of the last complete checkpoint.",
        lambda s: s.statistics.last_checkpoint_timestamp,
    ),
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
        family = HistogramMetricFamily(entry.name, entry.help)
        buckets, total = [], 0
        for bound, count in zip((*map(float, value.bounds), float("inf")), list(value.counts), strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family.add_metric([], buckets, value.sum)
        return family
    cls = CounterMetricFamily if entry.kind == "counter" else GaugeMetricFamily
    family = cls(entry.name, entry.help, labels=[entry.label] if entry.label else [])
    for label, number in value.items() if entry.label else [(None, value)]:
        family.add_metric([label] if entry.label else [], number)
    return family


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
