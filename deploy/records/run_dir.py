"""The run directory: one process at a time writes to it, and its log is kept there."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from shoal.deploy.records.json_lines import JsonFormatter


class CannotStart(ValueError):
    """The settings do not fit each other, the checkpoint or the run directory; nothing was started."""


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """One process per run directory."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CannotStart(f"run_dir: another process is writing to {run_dir}; choose another run_dir") from error
        yield


@contextlib.contextmanager
def log_file(run_dir: Path, *, json_lines: bool) -> Iterator[None]:
    """What is logged, and what this project says at level INFO, also goes to ``run.log``."""
    handler = logging.FileHandler(run_dir / "run.log")
    words = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if json_lines else words)
    root = logging.getLogger()
    root.addHandler(handler)
    # The terminal's own handler leaves INFO out.
    ours = logging.getLogger("shoal")
    level = ours.level
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(handler)
        handler.close()
