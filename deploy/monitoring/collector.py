"""The page that Prometheus reads, made of the catalogue (``deploy.monitoring.metrics_server`` serves it)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from shoal.deploy.monitoring.catalogue import CATALOGUE, INFO, CatalogueEntry, Sources
from shoal.learner.statistics import Histogram

log = logging.getLogger(__name__)


class RunCollector(Collector):
    """Reads the catalogue at every scrape; an entry that fails is left out of the page."""

    def __init__(self, sources: Sources | Mapping[str, Sources]) -> None:
        self._by_policy = {"": sources} if isinstance(sources, Sources) else dict(sources)
        self._of_run = {"": next(iter(self._by_policy.values()))}

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each entry that can be read."""
        for entry in CATALOGUE:
            values = {}
            for policy, sources in (self._of_run if entry.of_run else self._by_policy).items():
                try:
                    values[policy] = _checked(entry, entry.read(sources))
                except Exception:
                    sources.failed_readings[entry.name] += 1
                    if sources.failed_readings[entry.name] == 1:
                        log.exception("metric %s cannot be read", entry.name)
            if values:
                yield _family(entry, values)
        for name, (help, read) in INFO.items():
            (words,) = (read(sources) for sources in self._of_run.values())
            info = GaugeMetricFamily(name, help, labels=list(words))
            info.add_metric(list(words.values()), 1)
            yield info

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering reads no values."""
        return []


def _checked(entry: CatalogueEntry, value: Any) -> Any:
    """What was read, as numbers: an entry that is none fails before it is in a family."""
    if isinstance(value, Histogram):
        return value
    if not entry.label:
        return float(value)
    # A copy, because the training loop may add a label meanwhile.
    return {label: float(number) for label, number in {**dict.fromkeys(entry.values, 0), **value}.items()}


def _family(entry: CatalogueEntry, values: Mapping[str, Any]) -> Metric:
    """One metric with its value of every policy; without the label where there is one policy, whose name is ""."""
    labels = [*_policy_label(values), *([entry.label] if entry.label else [])]
    if entry.kind == "histogram":
        histogram = HistogramMetricFamily(entry.name, entry.help, labels=labels)
        for policy, value in values.items():
            bounds = (*(str(float(bound)) for bound in value.bounds), "+Inf")
            buckets = list(zip(bounds, accumulate(value.counts), strict=True))
            histogram.add_metric(_policy_value(policy), buckets, value.sum)
        return histogram
    cls = CounterMetricFamily if entry.kind == "counter" else GaugeMetricFamily
    family = cls(entry.name, entry.help, labels=labels)
    for policy, value in values.items():
        for own, number in [([label], n) for label, n in value.items()] if entry.label else [([], value)]:
            family.add_metric([*_policy_value(policy), *own], number)
    return family


def _policy_label(by_policy: Mapping[str, Any]) -> list[str]:
    return [] if "" in by_policy else ["policy"]


def _policy_value(policy: str) -> list[str]:
    return [policy] if policy else []


def make_registry(sources: Sources | Mapping[str, Sources]) -> CollectorRegistry:
    """Return a registry of the catalogue and of Python's own metrics of this process.

    Where ``sources`` are those of several policies by name, every metric of the catalogue has the label ``policy``, but
    for those of the whole run.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(sources))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
