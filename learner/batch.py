"""Assembles trajectories into one batch, a TensorDict in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from shoal.policy.trajectory import Trajectory, TrajectorySpec, allocate
from tensordict import TensorDict

_FLAGS = {"is_first", "terminated", "truncated", "memory_reset", "burn_in_is_first", "action_mask"}


class BatchAssembler:
    """Stacks the slots of several trajectories in buffers that are allocated once: the only copy on the way in.

    The batch's tensors share those buffers, so it is valid until the next ``assemble``.
    """

    def __init__(self, spec: TrajectorySpec, batch_size: int, *, pin_memory: bool = False) -> None:
        self.arrays = allocate(spec, batch_size)
        for name in ("policy_version", "unroll_index"):
            self.arrays[name] = np.zeros(batch_size, np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        if pin_memory:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for name in _FLAGS & tensors.keys():
            tensors[name] = tensors[name].view(torch.bool)
        self._batch = TensorDict(tensors, batch_size=[batch_size])

    def assemble(self, trajectories: Sequence[Trajectory]) -> TensorDict:
        """A TensorDict [B] of all slots in order: the trajectories' columns, ``policy_version`` and ``unroll_index``.

        Both are [B] int64. ``unroll_index`` grows by one with each unroll of a slot until its actor is replaced.

        Raises:
            ValueError: the trajectories do not have ``batch_size`` slots in all.
        """
        begin = 0
        for trajectory in trajectories:
            end = begin + trajectory.num_slots
            for name, column in trajectory.columns.items():
                self.arrays[name][begin:end] = column
            header = trajectory.header
            self.arrays["policy_version"][begin:end] = header.policy_version
            self.arrays["unroll_index"][begin:end] = header.restart_index << 32 | header.sequence
            begin = end
        if begin != self._batch.shape[0]:
            raise ValueError(f"expected {self._batch.shape[0]} segments in a batch, got {begin}")
        return self._batch
