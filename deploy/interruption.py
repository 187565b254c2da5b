"""Signals: the first asks a run to end well, the second ends it at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator


@dataclasses.dataclass(slots=True)
class Interruption:
    """Set once a signal came."""

    requested: threading.Event
    signal_number: int | None = None


@contextlib.contextmanager
def interruption() -> Iterator[Interruption]:
    """First SIGINT or SIGTERM: finish the update, save, sum up. Second: out at once."""
    asked = Interruption(threading.Event())

    def handle(number: int, _frame: object) -> None:
        if asked.requested.is_set():
            # No clean-up: the last checkpoint is complete, and Ray's processes end with this one.
            os._exit(128 + number)
        asked.signal_number = number
        asked.requested.set()
        print("\nstopping after this update; once more to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
