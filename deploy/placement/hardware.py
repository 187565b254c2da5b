"""The processor cores of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where a quota bounds its time.

    ``docker --cpus`` and the limits of Kubernetes are such quotas; the cores of the host stay visible under them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Processor seconds per second of this process's control groups and of those above them."""
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _quotas_of(CGROUPS, path, _version_2)
            elif "cpu" in controllers.split(","):
                yield from _quotas_of(CGROUPS / "cpu", path, _version_1)


def _quotas_of(root: Path, path: str, read: Callable[[Path], tuple[int, int]]) -> Iterator[float]:
    # In a container the path may be that of the host, which is not there; the limit is then at the root.
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):
            quota, period = read(place)
            if quota > 0 and period > 0:
                yield quota / period
        if place == root:
            return


def _version_2(place: Path) -> tuple[int, int]:
    quota, period = (place / "cpu.max").read_text().split()
    return int(quota), int(period)  # "max" is no number: no limit


def _version_1(place: Path) -> tuple[int, int]:
    quota, period = (int((place / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota, period  # -1: no limit
