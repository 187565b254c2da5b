"""Ends a run before its last step: the first signal after its update, the second at once, and ``max_seconds``."""

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
    """The request to end a run."""

    requested: threading.Event
    """Set by the first signal, and when the time is up."""
    signal_number: int | None = None
    """The first signal; None where none came."""
    stopped_by: str = ""
    """What asked first: ``signal``, ``max_seconds``, ``callback`` or ``ray_lost``."""
    time_is_up_at: float = math.inf
    """The end of ``max_seconds`` as a time of ``time.monotonic``; infinite without a limit."""
    _deferred: bool = False
    """A checkpoint is being written."""
    _waiting: bool = False
    """The second signal came meanwhile."""

    def stop(self, reason: str) -> None:
        """Ask the run to end after its update; from any thread."""
        self.stopped_by = self.stopped_by or reason
        self.requested.set()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block at whose end the second signal takes effect, where it raises and came inside."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._waiting:
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt, now or at the end of ``deferred``."""
        if not self._deferred:
            raise KeyboardInterrupt
        self._waiting = True


@contextlib.contextmanager
def interruption(max_seconds: float, *, owns_process: bool = True, quiet: bool = False) -> Iterator[Interruption]:
    """Handle signals and time for the length of the block.

    The first SIGINT, SIGTERM or SIGHUP (a closed terminal), and the end of ``max_seconds`` (0: no limit), ask the run
    to finish its update, to save and to write its summary. Signals are handled in the main thread only.

    Args:
        max_seconds: 0 is no limit.
        owns_process: a second signal ends the process at once. Otherwise it raises KeyboardInterrupt.
        quiet: print nothing.
    """
    asked = Interruption(threading.Event())
    again = "stop at once" if owns_process else "stop without finishing it"

    def handle(number: int, _frame: object) -> None:
        if asked.signal_number is not None:
            if not owns_process:
                asked.interrupt()
                return
            # No clean-up: the last checkpoint is complete, and Ray's processes end with this one.
            os._exit(128 + number)
        asked.signal_number = number
        asked.stop("signal")
        # A terminal that is gone takes no message.
        with contextlib.suppress(OSError, ValueError):
            if not quiet:
                print(
                    f"\nstopping: an update under way is finished; interrupt again to {again}",
                    file=sys.stderr,
                    flush=True,
                )

    # The clock has its own thread, because a run may wait for actors that never come.
    clock = threading.Timer(max_seconds, asked.stop, ["max_seconds"])
    clock.daemon = True
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A script that starts a run in the background leaves SIGINT ignored, so that Ctrl-C ends the script alone; nohup
    # leaves SIGHUP ignored.
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signals = [number for number in handled if in_main_thread and signal.getsignal(number) != signal.SIG_IGN]
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
