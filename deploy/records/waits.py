"""Says in the log that something takes long, while it does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

FIRST_SECONDS = 30.0
"""After these it is said for the first time, and then once a minute."""


@contextlib.contextmanager
def told_if_slow(doing: str) -> Iterator[None]:
    """Warn that ``doing`` has not ended, as long as the block has not.

    What is waited for may be other people's code, which never returns: the warning comes from another thread.
    """
    ended = threading.Event()
    since = time.monotonic()

    def tell() -> None:
        wait = FIRST_SECONDS
        while not ended.wait(wait):
            log.warning("%s has not ended after %.0f s; Ctrl-C ends the wait", doing, time.monotonic() - since)
            wait = 60.0

    teller = threading.Thread(target=tell, name="told-if-slow", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
