"""The Ray shell of a rollout worker: a process boundary and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
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
        root = str(Path(actors.__file__).resolve().parent.parent)
        if setup.package_root and root != setup.package_root:
            raise RuntimeError(
                f"this actor runs the code in {root}, the learner that in {setup.package_root}: "
                "install the same checkout in both (pip install -e .)"
            )
        keep_freed_memory()
        torch.set_num_threads(setup.num_threads)
        self._worker = setup.make_worker(actor, incarnation)

    def rollout(self, weights: Weights) -> np.ndarray:
        """One unroll as Arrow bytes."""
        return self._worker.rollout(weights)

    def process_id(self) -> int:
        """The id of this process."""
        return os.getpid()
