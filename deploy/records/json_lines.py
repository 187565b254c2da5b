"""What is said as JSON, one object a line (``log.format=json``): for Loki, Elastic and other readers of containers."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any


def event(kind: str, fields: Mapping[str, Any]) -> str:
    """One line: ``time`` (Unix seconds), ``event``, and its fields; numbers that are not finite are null."""
    clean = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}
    return json.dumps({"time": round(time.time(), 3), "event": kind, **clean}, default=str)


class JsonFormatter(logging.Formatter):
    """Log records as events: ``level``, ``logger``, ``message``, and ``exception`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """As the base class."""
        fields = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({"time": round(record.created, 3), "event": "log", **fields})
