"""Logs messages that come again and again: an environment that fails in every episode fills no screen."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

SHOWN = 3
"""Messages of each kind that are shown."""
EVERY_SECONDS = 60.0
"""Between two lines that count the others."""
_MOST_KINDS = 64
"""Beyond so many kinds messages are counted as one more kind: their texts may have anything in them."""
_VARIES = re.compile(r"0x[0-9a-fA-F]+|\d+")
"""What two messages of one kind may differ in: slots, steps, seeds, values, addresses."""


class RepeatedMessages:
    """Shows the first messages of every kind, and from then on how many more there were.

    Args:
        what: the messages in a word, in the plural.
        log: takes them as warnings.
        clock: seconds.
    """

    def __init__(self, what: str, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._log, self._clock = what, log, clock
        self._kinds: Counter[str] = Counter()
        self._all = self._more = 0
        self._last = ""
        self._since = clock()

    def add(self, messages: Iterable[str]) -> None:
        """Log messages, or count them."""
        for message in messages:
            self._all += 1
            kind = _VARIES.sub("#", message)
            if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
                kind = ""
            self._kinds[kind] += 1
            if self._kinds[kind] < SHOWN:
                self._log.warning("%s", message)
            elif self._kinds[kind] == SHOWN:
                self._log.warning("%s (more of this kind are counted)", message)
            else:
                self._more, self._last = self._more + 1, message
        if self._more and self._clock() - self._since >= EVERY_SECONDS:
            self.count()

    def count(self) -> None:
        """Log how many there were since the last time; nothing if all were shown."""
        if self._more:
            self._log.warning(
                "%d more %s of kinds that were shown, %d in all; the last: %s",
                self._more,
                self._what,
                self._all,
                self._last,
            )
        self._more, self._since = 0, self._clock()
