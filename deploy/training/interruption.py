"""What ends a run before its last step: a signal, the second of which ends it at once, and the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


@dataclasses.dataclass(slots=True)
class Interruption:
    """``requested`` is set once a signal came, or the time is up."""

    requested: threading.Event
    signal_number: int | None = None
    time_is_up_at: float = math.inf
    """By ``time.monotonic``."""


@contextlib.contextmanager
def interruption(max_seconds: float) -> Iterator[Interruption]:
    """First SIGINT or SIGTERM, or ``max_seconds`` over (0: no limit): finish the update, save, sum up. Second signal:
    out at once."""
    asked = Interruption(threading.Event())

    def handle(number: int, _frame: object) -> None:
        if asked.signal_number is not None:
            # No clean-up: the last checkpoint is complete, and Ray's processes end with this one.
            os._exit(128 + number)
        asked.signal_number = number
        asked.requested.set()
        print("\nstopping after this update; once more to stop at once", file=sys.stderr, flush=True)

    # Its own thread, because a run may wait for actors that never come.
    clock = threading.Timer(max_seconds, asked.requested.set)
    clock.daemon = True
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A script that starts a run in the background leaves SIGINT ignored, so that Ctrl-C ends the script alone.
    signals = [s for s in (signal.SIGINT, signal.SIGTERM) if in_main_thread and signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in signals}
    if max_seconds:
        asked.time_is_up_at = time.monotonic() + max_seconds
        clock.start()
    try:
        yield asked
    finally:
        clock.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
