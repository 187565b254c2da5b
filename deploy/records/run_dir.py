"""The run directory: its lock and its log."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from shoal.deploy.records.json_lines import JsonFormatter


class CannotStart(ValueError):
    """The settings conflict with each other, the checkpoint or the run directory; nothing was started."""


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory: only one process may write to it."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CannotStart(f"run_dir: another process is writing to {run_dir}; choose another run_dir") from error
        yield


@contextlib.contextmanager
def log_file(run_dir: Path, *, json_lines: bool) -> Iterator[None]:
    """Also write log records to ``run.log``, and shoal's own from level INFO on."""
    handler = logging.FileHandler(run_dir / "run.log")
    words = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if json_lines else words)
    root = logging.getLogger()
    root.addHandler(handler)
    # The terminal's handler leaves out INFO.
    ours = logging.getLogger("shoal")
    level = ours.level
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()
