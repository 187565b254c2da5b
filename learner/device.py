"""Where the update runs, and how batches get there. ``learner.cuda`` has the path for NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from shoal.policy.recurrent_policy import RecurrentPolicy
from tensordict import TensorDict


class DevicePath:
    """The CPU (and MPS): batches are used where they were assembled, or copied over.

    With ``bfloat16`` the network's large products are; weights, gradients, optimizer, losses and targets stay float32.
    """

    pin_memory = False
    fused_optimizer: bool = True

    def __init__(self, device: torch.device, *, bfloat16: bool = False) -> None:
        self.device = device
        self._bfloat16 = bfloat16

    def to_device(self, batch: TensorDict) -> TensorDict:
        """The batch on the learner's device."""
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 where it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else contextlib.nullcontext()

    @property
    def is_exact(self) -> bool:
        """Whether updates compute in float32 throughout, so that their log-probabilities compare with an actor's."""
        return not self._bfloat16

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """float32 throughout for the block, whatever updates use: for the parity check."""
        before, self._bfloat16 = self._bfloat16, False
        try:
            yield
        finally:
            self._bfloat16 = before

    def prepare(self, policy: RecurrentPolicy) -> None:
        """Make the policy that is trained here faster; once, after every copy of it has been made."""

    def memory_bytes(self) -> dict[str, int]:
        """Of the accelerator: ``allocated`` to tensors, ``reserved`` for them, and the ``total``; empty for the CPU.
        From torch's own books: nothing waits for the device."""
        if self.device.type != "mps":
            return {}
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
            "total": torch.mps.recommended_max_memory(),
        }

    def describe(self) -> str:
        """For logs."""
        return f"{self.device}{', bfloat16' if self._bfloat16 else ''}"
