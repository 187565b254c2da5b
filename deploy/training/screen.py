"""The screen as a place where nothing can go wrong: a run goes on when nobody reads it any more."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

log = logging.getLogger(__name__)


class Screen:
    """Standard output that loses what cannot be written, and says so once to ``run.log``.

    A reader that ended (``| head``), a full disk behind ``>``, and a terminal that is gone end no run. Characters that
    the encoding lacks are written as escapes.
    """

    def __init__(self) -> None:
        # Not looked up again: the live view puts something in its place that writes here.
        self._stream = sys.stdout
        self._lost = False

    def write(self, text: str) -> int:
        """Write ``text``, or lose it."""
        encoding = self._stream.encoding or "utf-8"
        return self._try(lambda: self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))

    def flush(self) -> None:
        """Flush what was written, or lose it."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], int | None]) -> int:
        if self._lost:
            return 0
        try:
            return act() or 0
        except (OSError, ValueError) as error:
            self._lost = True
            discard(self._stream)
            log.info("nothing can be written to standard output any more, training goes on: %s", error)
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def discard(stream: IO[str]) -> None:
    """Lose what is still in the buffer of ``stream``, and all that comes: Python fails at its end otherwise."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def printing_to_standard_error() -> Iterator[None]:
    """Whatever is printed inside, also from C and by other processes, goes to standard error."""
    sys.stdout.flush()
    output = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)
