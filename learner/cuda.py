"""The CUDA path: pinned staging, copies on a side stream. Imported only where the learner runs on a GPU."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from learner.device import DevicePath


class CudaPath(DevicePath):
    """Batches are assembled in pinned memory and copied while the current stream still works on the update before."""

    pin_memory = True

    def __init__(self, *, autocast: bool = False) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()), autocast=autocast)
        self._copies = torch.cuda.Stream(self.device)
        torch.set_float32_matmul_precision("high")

    def to_device(self, batch: TensorDict) -> TensorDict:
        """Copy on the side stream; the current stream waits for it, the host for the pinned buffers to be free."""
        with torch.cuda.stream(self._copies):
            on_device = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for tensor in on_device.values():
            # Allocated on the side stream, used on this one: the allocator must not reuse it before both are done.
            tensor.record_stream(current)
        # The staging buffers are overwritten by the next batch.
        self._copies.synchronize()
        return on_device

    def describe(self) -> str:
        """For logs."""
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
