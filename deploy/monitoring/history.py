"""Writes ``RUN/metrics.jsonl``: every metric of the catalogue over time, one JSON object a line.

A line has ``time`` (Unix seconds), ``session`` (0, 1, .. of a resumed run), ``seconds`` (of training in this session),
``env_steps`` (trained in the whole run) and ``policy_version``; then every metric: ``name``, or ``name/value`` where it
has a label. Its name is that of the metric without ``shoal_`` and ``_total``, or another that the catalogue gives it
(``CatalogueEntry.key``): all numbers of the loss are ``loss/...``, also those that ``shoal_loss_metric`` has by their
names, and null where ``learner.loss`` has no such term. A histogram gives ``name/count``, ``name/mean`` (of the
observations since the line before; null if there were none) and ``name/max`` (of the session). Counters begin with the
session, at 0 for every value that a label can have; ``failed_readings`` has the metrics that failed only.
``process_cpu_seconds`` and ``process_resident_memory_bytes`` are those of this process, on Linux. A value that is not
finite is null. A run that was resumed from an older checkpoint goes back in ``env_steps``; earlier lines beyond that
step describe discarded work.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import ProcessCollector
from shoal.deploy.monitoring.catalogue import CATALOGUE, CatalogueEntry, Sources
from shoal.deploy.monitoring.sinks import SinkThread
from shoal.deploy.records.json_lines import append
from shoal.learner.statistics import Histogram

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
Line = dict[str, float | int | None]


class MetricsHistory:
    """Writes a line every ``every_seconds`` from a thread of its own, and passes it to the sinks."""

    def __init__(
        self, sources: Sources, run_dir: Path, *, session: int, every_seconds: float, sinks: Sequence[SinkThread] = ()
    ) -> None:
        self._sources, self._path, self._session = sources, run_dir / FILE, session
        self._every, self._sinks = every_seconds, sinks
        self._reader, self._process = CatalogueReader(), ProcessReader()
        self._failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="metrics-history", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last line, with the final values."""
        self._stopped.set()
        self._thread.join()
        self._write()
        for sink in self._sinks:
            sink.close()

    def _keep_writing(self) -> None:
        while not self._stopped.wait(self._every):
            self._write()

    def _write(self) -> None:
        line = self._line()
        try:
            append(self._path, line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written, training goes on without: %s", self._path, error)
            self._failed = True
        for sink in self._sinks:
            sink.put(line)

    def _line(self) -> Line:
        statistics = self._sources.statistics
        head: Line = {
            "time": round(time.time(), 3),
            "session": self._session,
            "seconds": round(statistics.seconds, 3),
            "env_steps": self._sources.ledger.trained,
            "policy_version": statistics.policy_version,
        }
        return head | self._reader.read(self._sources) | self._process.read()


class CatalogueReader:
    """Reads the catalogue as plain numbers; remembers the last state of histograms to report means in between."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, float]] = {}

    def read(self, sources: Sources) -> Line:
        """Return a number, or None, for each name; an entry that fails is left out."""
        line: Line = {}
        for entry in CATALOGUE:
            name = entry.history_name
            try:
                value = entry.read(sources)
                if isinstance(value, Histogram):
                    line |= self._since(name, value)
                elif entry.label:
                    # A copy, because the training loop may add a label meanwhile.
                    found = {**dict.fromkeys(_zeros(entry), 0), **value}
                    line |= {f"{name}/{label}": _finite(number) for label, number in found.items()}
                else:
                    line[name] = _finite(value)
            except Exception:
                sources.failed_readings[entry.name] += 1
                if sources.failed_readings[entry.name] == 1:
                    log.exception("metric %s cannot be read", entry.name)
        return line

    def _since(self, name: str, histogram: Histogram) -> Line:
        count, total = histogram.count, histogram.sum
        count_before, total_before = self._before.get(name, (0, 0.0))
        self._before[name] = count, total
        new = count - count_before
        return {
            f"{name}/count": count,
            f"{name}/mean": _finite((total - total_before) / new) if new else None,
            f"{name}/max": _finite(histogram.max),
        }


class ProcessReader:
    """Reads what this process takes of the machine, by prometheus_client's names; seconds since this was made."""

    def __init__(self) -> None:
        self._collector = ProcessCollector(registry=None)
        self._before = self._now().get("process_cpu_seconds", 0.0)

    def read(self) -> Line:
        """Return ``process_cpu_seconds`` and ``process_resident_memory_bytes``; nothing where there is no /proc."""
        found = self._now()
        if "process_cpu_seconds" in found:
            found["process_cpu_seconds"] = round(found["process_cpu_seconds"] - self._before, 3)
        return {name: _finite(number) for name, number in found.items()}

    def _now(self) -> dict[str, float]:
        wanted = ("process_cpu_seconds", "process_resident_memory_bytes")
        return {m.name: m.samples[0].value for m in self._collector.collect() if m.name in wanted}


def _zeros(entry: CatalogueEntry) -> tuple[str, ...]:
    # Metrics that can fail are as many as there are: they would double each line, and the charts of a tracker.
    return () if entry.label == "metric" else entry.values


def _finite(value: Any) -> float | int | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
