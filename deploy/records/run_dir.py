"""The run directory: its lock and its log."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import logging
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.deploy.records.json_lines import JsonFormatter
from shoal.problems import Problems

MEMORY_HORIZON = "memory_horizon.json"
"""File of what ``shoal evaluate --memory-horizon`` found."""

_ENDLESS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFBLK: "a device"}
"""Kinds of files that keep waiting whoever opens them, or are no place for records. A character device may be
``/dev/null``, which keeps none on purpose."""


_naming = threading.Lock()
_named: set[str] = set()
"""Names that runs of this process have, whose directories may not be made yet."""


class CannotStart(Problems):
    """The settings conflict with each other, the checkpoint or the run directory; nothing was started."""


def new_run_dir(env_id: str) -> str:
    """A directory below ``runs/``, named after the environment and the time.

    Python's own words in the names of functions and classes that were given as objects are left out.
    """
    plain = re.sub(r"^__main__:|<locals>|\bpartial\(", "", env_id)
    name = re.sub(r"[^\w-]+", "-", plain).strip("-") or "environment"
    path = f"runs/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    # Runs of one process may begin within a second, and a run would continue what it finds.
    names = itertools.chain([path], (f"{path}-{i}" for i in itertools.count(2)))
    with _naming:
        found = next(one for one in names if one not in _named and not Path(one).exists())
        _named.add(found)
    return found


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory: only one process may write to it.

    Raises:
        CannotStart: another one does; or a file that a run writes or reads there is none.
    """
    for path in run_dir.iterdir():
        # Symbolic links are followed; one to nowhere becomes a file.
        with contextlib.suppress(FileNotFoundError):
            if (kind := stat.S_IFMT(path.stat().st_mode)) in _ENDLESS:
                raise CannotStart(
                    f"run_dir: expected files and directories in {run_dir}, {path.name} is {_ENDLESS[kind]}; "
                    "remove it or choose another run_dir"
                )
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
