"""The processor cores and the memory that this process may use."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
