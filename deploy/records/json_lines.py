"""JSON lines: the files that a run appends to, and its output with ``log.format=json``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line. A partial line left by a killed process stays a line of its own.

    Raises:
        OSError: the file cannot be written.
        ValueError: a number is not finite; JSON has no such numbers.
    """
    text = json.dumps(line, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        torn = file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n"
        file.write((b"\n" if torn else b"") + text)


def event(kind: str, fields: Mapping[str, Any]) -> str:
    """Return a line with ``time`` (Unix seconds), ``event`` and fields; numbers that are not finite are null."""
    clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}
    return json.dumps({"time": round(time.time(), 3), "event": kind, **clean}, default=str)


class JsonFormatter(logging.Formatter):
    """Formats log records as events with ``level``, ``logger``, ``message`` and, if there is one, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a JSON line."""
        fields = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({"time": round(record.created, 3), "event": "log", **fields})
