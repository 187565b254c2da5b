"""The CUDA path: pinned staging, copies on a side stream. It is imported only where the learner runs on a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from shoal.learner.device import DevicePath
from shoal.policy.recurrent_policy import RecurrentPolicy
from tensordict import TensorDict


class CudaPath(DevicePath):
    """Batches are assembled in pinned memory and copied while the current stream still works on the update before."""

    pin_memory = True

    def __init__(self, *, bfloat16: bool = False, compile_policy: bool = False) -> None:
        super().__init__(torch.device("cuda", torch.cuda.current_device()), bfloat16=bfloat16)
        self._copies = torch.cuda.Stream(self.device)
        # The LSTM's weights are joined with those of its emptying steps anew in every update (policy.lstm).
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        self._compile = compile_policy
        # TF32 rounds to 10 bits; it is allowed only with bfloat16, where rounding was asked for.
        self._rounds = bfloat16
        _set_tf32(bfloat16)

    def to_device(self, batch: TensorDict) -> TensorDict:
        """Copy on the side stream; the current stream waits for it, the host until the pinned buffers are free."""
        with torch.cuda.stream(self._copies):
            on_device = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for tensor in on_device.values():
            # Allocated on the side stream, used on this one: the allocator must not reuse it before both are done.
            tensor.record_stream(current)
        # The next batch overwrites the staging buffers.
        self._copies.synchronize()
        return on_device

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Compute without bfloat16 and TF32 in the block."""
        with super().exact():
            _set_tf32(False)
            try:
                yield
            finally:
                _set_tf32(self._rounds)

    def prepare(self, policy: RecurrentPolicy) -> None:
        """Compile the parts whose shapes do not change; the core between them has kernels of its own."""
        if self._compile:
            # mypy takes a method for a constant; on the instance it is an attribute like any other.
            policy.encode = torch.compile(policy.encode)  # type: ignore[method-assign]
            policy.heads = torch.compile(policy.heads)  # type: ignore[method-assign]

    def memory_bytes(self) -> dict[str, int]:
        """As the base class: ``allocated`` and ``reserved`` are of this process, ``total`` is the GPU's."""
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
            "total": torch.cuda.get_device_properties(self.device).total_memory,
        }

    def describe(self) -> str:
        """The device's name and precision for logs."""
        return f"{super().describe()} ({torch.cuda.get_device_name(self.device)})"


def _set_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
