"""Which device ``learner.device`` means on this machine. CUDA code is imported only where it is used."""

from __future__ import annotations

import torch

from learner.config import LearnerConfig
from learner.device import DevicePath


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
    if name == "cuda":
        from learner.cuda import CudaPath

        return CudaPath(autocast=config.autocast, compile_policy=config.compile)
    return DevicePath(torch.device(name), autocast=config.autocast and name != "cpu")
