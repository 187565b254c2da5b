"""A node's report of its code, versions and free space. Small: nodes import it only to answer."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
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
    missing: tuple[str, ...]
    """Those of the packages it was asked for that no import finds there."""


def probe(packages: Sequence[str] = ()) -> Probe:
    """The report of this node; ``packages`` are top-level names, which are looked for and not imported."""
    shm, temp = Path("/dev/shm"), Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    return Probe(
        this_code(),
        versions(),
        shutil.disk_usage(shm).free if shm.is_dir() else None,
        shutil.disk_usage(temp).free,
        tuple(name for name in packages if importlib.util.find_spec(name) is None),
    )
