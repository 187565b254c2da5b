"""The page that ``/metrics`` returns, made once for all clients that ask within a moment."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gzip
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import CollectorRegistry

REUSE_SECONDS = 0.25
PAGE_SECONDS = 5.0
"""A client waits no longer for the metrics to be read; Prometheus gives a scrape 10 seconds."""
MAX_FORMATS = 8
"""Formats of one page that are kept: each version in an Accept header makes another."""


class MetricsPage:
    """The metrics of a registry as bytes, for coroutines of one event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._reading: asyncio.Future[_Families] | None = None
        self._read_at = 0.0
        self._families: _Families | None = None
        self._rendered: dict[tuple[str, bool], bytes] = {}

    async def render(self, accept: str, *, compress: bool) -> tuple[bytes, str]:
        """Return (page, content type) in the format that prometheus_client chooses for an Accept header.

        Raises:
            TimeoutError: the metrics took longer than ``PAGE_SECONDS`` to read.
        """
        if self._reading is None or (self._reading.done() and time.monotonic() - self._read_at > REUSE_SECONDS):
            self._reading = self._start_reading()
        families = await asyncio.wait_for(asyncio.shield(self._reading), PAGE_SECONDS)
        if families is not self._families:
            self._families = families
            self._rendered.clear()
        encode, content_type = choose_encoder(accept)
        page = self._rendered.get((content_type, compress))
        if page is None:
            page = encode(families)
            if compress:
                page = gzip.compress(page, compresslevel=1)
            if len(self._rendered) < MAX_FORMATS:
                self._rendered[content_type, compress] = page
        return page, content_type

    def close(self) -> None:
        """Let go of a reading under way."""
        if self._reading:
            self._reading.cancel()

    def _start_reading(self) -> asyncio.Future[_Families]:
        # Not in an executor: its threads keep the process from ending while a metric hangs.
        result: concurrent.futures.Future[_Families] = concurrent.futures.Future()
        result.set_running_or_notify_cancel()

        def read() -> None:
            try:
                families = _Families(list(self._registry.collect()))
            except Exception as error:  # noqa: BLE001  (raised again where the page is awaited)
                self._read_at = time.monotonic()
                result.set_exception(error)
            else:
                # From the end of a reading: those who ask during it share it.
                self._read_at = time.monotonic()
                result.set_result(families)

        threading.Thread(target=read, name="metrics-page", daemon=True).start()
        return asyncio.wrap_future(result)


class _Families(NamedTuple):
    """The part of a registry that an encoder uses."""

    families: list[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families
