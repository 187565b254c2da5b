"""Which device ``learner.device`` means on this machine. CUDA code is imported only where it is used."""

from __future__ import annotations

import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath


class DeviceNotFound(ValueError):
    """The configured device is not on this machine."""


def check_device(config: LearnerConfig) -> str | None:
    """What is wrong with ``learner.device`` on this machine, or None."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if present.get(config.device, True):
        return None
    found = ", ".join(["cpu", *(name for name, there in present.items() if there)])
    return f"device={config.device} is not available here (found: {found}); use device=auto"


def make_device_path(config: LearnerConfig) -> DevicePath:
    """The path of ``learner.device``.

    Raises:
        DeviceNotFound: the device is not on this machine.
    """
    if problem := check_device(config):
        raise DeviceNotFound(problem)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16(name))
    if name == "cuda":
        from shoal.learner.cuda import CudaPath

        return CudaPath(bfloat16=bfloat16, compile_policy=config.compile)
    return DevicePath(torch.device(name), bfloat16=bfloat16)


def multiplies_bfloat16(device: str) -> bool:
    """Whether ``device`` has units for products of bfloat16 that make updates faster (``shoal bench kernels``).

    It is asked of the hardware, not timed: every process of a run, and the run that resumes it, decides the same.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_amx_tile_supported()
