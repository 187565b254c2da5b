"""The Ray shell of a rollout worker: a process boundary and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from shoal.actors.code import check_same_code
from shoal.actors.rollout import RolloutWorker
from shoal.actors.teams import TeamSetup, TeamWorker
from shoal.actors.worker_setup import WorkerSetup
from shoal.policy.allocator import keep_freed_memory


class ProcessLocation(NamedTuple):
    """A process in the cluster."""

    node_id: str
    process_id: int
    age_seconds: float | None = None
    """Since the process began, when this was told; None where that is not known."""

    def __str__(self) -> str:
        return f"process {self.process_id} on node {self.node_id[:8]}"


def process_location() -> ProcessLocation:
    """The location of this process."""
    return ProcessLocation(ray.get_runtime_context().get_node_id(), os.getpid(), _age_seconds())


def _age_seconds() -> float | None:
    try:
        # Fields are counted from behind the process's name, which may hold anything.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return None


class RolloutActor:
    """One rollout worker in a process of its own; wrapped by ``ray.remote`` in the pool.

    Made in two steps, so that waiting for a place in the cluster and making the environments can be told apart.
    A trajectory is *returned*, not put: the pool then owns it, and it survives this process.
    """

    def __init__(self, setup: WorkerSetup | TeamSetup, actor: int, restart_index: int) -> None:
        self._setup, self._actor, self._restart_index = setup, actor, restart_index
        self._worker: RolloutWorker | TeamWorker | None = None

    def process_location(self) -> ProcessLocation:
        """The location of this process."""
        return process_location()

    def build(self) -> None:
        """Make policy and environments."""
        check_same_code(self._setup.code)
        keep_freed_memory()
        torch.set_num_threads(self._setup.num_threads)
        self._worker = self._setup.make_worker(self._actor, self._restart_index, ray.get)

    def rollout(self, weights: Any) -> np.ndarray | list[np.ndarray]:
        """One unroll as Arrow bytes: with ``Weights``, or for several policies with a reference to those of each."""
        assert self._worker is not None
        return self._worker.rollout(weights)
