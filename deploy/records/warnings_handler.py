"""Warnings of a run on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any


class WarningsHandler(logging.StreamHandler[Any]):
    """Writes warnings to the current ``sys.stderr``, which the live view replaces for as long as it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write ``record`` to the current ``sys.stderr``."""
        self.stream = sys.stderr
        super().emit(record)
