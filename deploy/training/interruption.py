"""Ends a run before its last step: a signal after its update, one that insists at once, and ``max_seconds``."""

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
from pathlib import Path
from typing import Any

from shoal.envs.processes import STOPPING

_INSISTENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of which the second ends a run at once. The others come more than once by themselves: SIGHUP from the shell
and from its terminal, SIGXCPU with every further second of processor time, SIGUSR1 before a scheduler's SIGTERM."""
_FREE = (signal.SIGUSR1, signal.SIGXCPU)
"""Signals that programs use for purposes of their own."""


@dataclasses.dataclass(slots=True)
class Interruption:
    """The request to end a run."""

    requested: threading.Event
    """Set by a signal, and when the time is up."""
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

    SIGINT, SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and SIGXCPU (schedulers, before a limit), and the end of
    ``max_seconds`` (0: no limit), ask the run to finish its update, to save and to write its summary. Signals are
    handled in the main thread only, and SIGUSR1 and SIGXCPU where the program has no handler of its own.

    Args:
        max_seconds: 0 is no limit.
        owns_process: the second SIGINT or SIGTERM ends the process at once. Otherwise it raises KeyboardInterrupt.
        quiet: print nothing.
    """
    asked = Interruption(threading.Event())
    again = "stop at once" if owns_process else "stop without finishing it"

    insisted = False

    def handle(number: int, _frame: object) -> None:
        nonlocal insisted
        if insisted and number in _INSISTENT:
            if not owns_process:
                asked.interrupt()
                return
            # No clean-up: the last checkpoint is complete, and Ray's processes end with this one.
            os._exit(128 + number)
        insisted |= number in _INSISTENT
        if asked.signal_number is not None:
            return
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
    signals = [number for number in STOPPING if in_main_thread and signal.getsignal(number) != signal.SIG_IGN]
    signals = [number for number in signals if number not in _FREE or not _is_taken(number)]
    before = {number: signal.signal(number, handle) for number in signals}
    _handlers_before.update(before)
    if max_seconds:
        asked.time_is_up_at = time.monotonic() + max_seconds
        clock.start()
    try:
        yield asked
    finally:
        clock.cancel()
        for number, handler in before.items():
            _handlers_before.pop(number, None)
            signal.signal(number, handler)


_handlers_before: dict[signal.Signals, Any] = {}
"""Of the program, for as long as a run has handlers of its own."""


class _Forking(threading.local):
    mask: set[int] | None = None
    """Of this thread before its fork; None where no run has handlers."""


_forking = _Forking()


def _before_fork() -> None:
    # What reaches the child too early would be taken for the run's, and be lost.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers_before) if _handlers_before else None


def _after_fork() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_forked_process() -> None:
    """It is not the run: an environment that starts one ends it by SIGTERM."""
    for number, handler in _handlers_before.items():
        if handler is not None:  # None: one that was not set from Python
            signal.signal(number, handler)
    _handlers_before.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_process)


def _is_taken(number: signal.Signals) -> bool:
    """Whether the program does something with a signal, also from C, as ``faulthandler.register`` has it."""
    if signal.getsignal(number) != signal.SIG_DFL:
        return True
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux
        return False
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)
