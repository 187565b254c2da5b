"""What the adapters share: their arguments, the window of time that is measured, and the line they end with."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from typing import Any

SLOTS = 64
UNROLL = 64
BATCH = SLOTS * UNROLL
LEAST_UPDATES = 3


def arguments() -> tuple[float, float, dict[str, Any]]:
    """Seconds to measure, seconds of training before that, and the peer's settings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warmup", type=float, default=15.0)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    options = parser.parse_args()
    return options.seconds, options.warmup, options.settings


class Window:
    """Environment steps trained between the first update that ends after the warm-up and the first that ends after the
    window, but over ``LEAST_UPDATES`` at least.

    The clock starts with the first update, so what it takes to start is not counted.
    """

    def __init__(self, seconds: float, warmup: float) -> None:
        self._seconds, self._warmup = seconds, warmup
        self._begin: float | None = None
        self._marks: list[tuple[float, int]] = []

    def add(self, trained: int, when: float | None = None) -> bool:
        """An update ended by which ``trained`` steps were trained in all; whether the window is full."""
        when = time.monotonic() if when is None else when
        if self._begin is None:
            self._begin = when
        if when - self._begin >= self._warmup:
            self._marks.append((when, trained))
        return when - self._begin >= self._warmup + self._seconds and len(self._marks) > LEAST_UPDATES

    def report(self, packages: tuple[str, ...], **more: Any) -> None:
        """Print the result as the one JSON line that the caller looks for."""
        if len(self._marks) < 2:
            raise RuntimeError(f"only {len(self._marks)} updates ended after the warm-up of {self._warmup} s")
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        versions = {name: importlib.metadata.version(name) for name in (*packages, "torch", "numpy", "gymnasium")}
        versions["python"] = platform.python_version()
        result = {"env_steps": last - first, "seconds": end - start, "versions": versions, **more}
        # Peers print without a newline at the end.
        sys.stdout.write("\n" + json.dumps(result) + "\n")
        sys.stdout.flush()
