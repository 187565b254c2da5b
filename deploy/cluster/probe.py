"""A node's report of its code, versions and free space. Small: nodes import it only to answer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from shoal.actors.code import Code, this_code
from shoal.deploy.placement.versions import versions


class Probe(NamedTuple):
    """One node's answer."""

    code: Code
    versions: dict[str, str]
    shared_memory_bytes: int | None
    """Free in /dev/shm, where there is one."""
    disk_bytes: int
    """Free where Ray keeps its files."""


def probe() -> Probe:
    """The report of this node."""
    shm, temp = Path("/dev/shm"), Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    return Probe(
        this_code(),
        versions(),
        shutil.disk_usage(shm).free if shm.is_dir() else None,
        shutil.disk_usage(temp).free,
    )
