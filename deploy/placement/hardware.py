"""The processor cores and the memory that this process may use."""

from __future__ import annotations

import contextlib
import os
import resource
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


def memory_bytes() -> int:
    """Bytes of memory: the machine's, or less where control groups (containers) or ``ulimit -v`` allow less.

    Memory that is in use at the moment counts, too.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *control_group_limits()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)


def control_group_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Memory limits in bytes of this process's control groups and the groups around them.

    Args:
        root: mount point of the control groups, of version 1 or 2.
        membership: file that names the groups of the process.
    """
    files = []
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mount, name = root, "memory.max"  # version 2
            elif controllers == "memory":
                mount, name = root / "memory", "memory.limit_in_bytes"
            else:
                continue
            group = mount / path.strip("/")
            files += [folder / name for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    limits = []
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit: "max"
            limits.append(int(file.read_text()))
    return limits
