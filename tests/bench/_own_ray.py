"""A Ray cluster of a benchmark's own, whatever the developer's environment names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def own_ray() -> None:
    """Set Ray's environment variables; before Ray is imported."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    if "RAY_TMPDIR" not in os.environ:
        # Sockets need a short path.
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="shoal-", dir="/tmp")
        Path(os.environ["RAY_TMPDIR"], "ray").mkdir()
