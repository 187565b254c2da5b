"""The Ray shell of a rollout worker: a process boundary and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import ray
import torch

import actors
from actors.agent import WorkerSetup
from policy.allocator import keep_freed_memory
from policy.weights import Weights


class RolloutActor:
    """One rollout worker in a process of its own; wrapped by ``ray.remote`` in the pool.

    A trajectory is *returned*, not put: the pool then owns it, and it survives this process.
    """

    def __init__(self, setup: WorkerSetup, actor: int, incarnation: int) -> None:
        check_same_code(setup.package_root)
        keep_freed_memory()
        torch.set_num_threads(setup.num_threads)
        self._worker = setup.make_worker(actor, incarnation)

    def rollout(self, weights: Weights) -> np.ndarray:
        """One unroll as Arrow bytes."""
        return self._worker.rollout(weights)

    def whereabouts(self) -> Whereabouts:
        """This process."""
        return whereabouts()


class Whereabouts(NamedTuple):
    """A process in the cluster."""

    node_id: str
    process_id: int


def whereabouts() -> Whereabouts:
    """This process."""
    return Whereabouts(ray.get_runtime_context().get_node_id(), os.getpid())


def check_same_code(package_root: str) -> None:
    """Raises RuntimeError where this process runs another checkout than the one that started it."""
    root = str(Path(actors.__file__).resolve().parent.parent)
    if package_root and root != package_root:
        raise RuntimeError(
            f"this actor runs the code in {root}, the learner that in {package_root}: "
            "install the same checkout in both (pip install -e .)"
        )
