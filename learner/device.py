"""The device that updates run on and the way of batches to it. ``learner.cuda`` has the path for NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from shoal.policy.recurrent_policy import RecurrentPolicy
from tensordict import TensorDict


class DevicePath:
    """The path for the CPU, where batches are used in place, and for MPS, to which they are copied.

    With ``bfloat16`` the network's large products are computed in bfloat16; weights, gradients, optimizer, losses and
    targets stay float32.
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
        """A block that computes in bfloat16, where that is configured."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else contextlib.nullcontext()

    @property
    def is_exact(self) -> bool:
        """True if updates compute in float32 throughout, so that their log-probabilities compare with an actor's."""
        return not self._bfloat16

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Compute in float32 throughout in the block, whatever updates use; the parity check needs it."""
        before, self._bfloat16 = self._bfloat16, False
        try:
            yield
        finally:
            self._bfloat16 = before

    def prepare(self, policy: RecurrentPolicy) -> None:
        """Make the policy that is trained here faster; called once, after all copies of it were made."""

    def memory_bytes(self) -> dict[str, int]:
        """The accelerator's bytes ``allocated`` to tensors, ``reserved`` for them, and in ``total``; empty for the CPU.

        torch keeps these numbers itself: the call does not wait for the device.
        """
        if self.device.type != "mps":
            return {}
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
            "total": torch.mps.recommended_max_memory(),
        }

    def describe(self) -> str:
        """The device's name and precision for logs."""
        return f"{self.device}{', bfloat16' if self._bfloat16 else ''}"
