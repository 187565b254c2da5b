"""Chooses the device that ``learner.device`` means on this machine. CUDA code is imported only where it is used."""

from __future__ import annotations

import functools

import torch
from shoal.learner.config import LearnerConfig
from shoal.learner.device import DevicePath

NO_BFLOAT16 = "torch cannot run an LSTM in bfloat16 on this processor"


class DeviceNotFound(ValueError):
    """This machine does not have the configured device, or the device cannot compute in the configured precision."""


def check_device(config: LearnerConfig) -> str | None:
    """The problem with ``learner.device`` on this machine, or None."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if present.get(config.device, True):
        return None
    found = ", ".join(["cpu", *(name for name, there in present.items() if there)])
    return f"device={config.device} is not available here (found: {found}); use device=auto"


def check_precision(config: LearnerConfig) -> str | None:
    """The problem with ``learner.precision`` on the configured device, or None."""
    if config.precision != "bfloat16" or runs_bfloat16(device_name(config)):
        return None
    return f"precision=bfloat16 is not available here ({NO_BFLOAT16}); use precision=auto or float32"


def device_name(config: LearnerConfig) -> str:
    """``cpu``, ``cuda`` or ``mps``: what ``learner.device`` means on this machine."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def make_device_path(config: LearnerConfig) -> DevicePath:
    """The path of ``learner.device``.

    Raises:
        DeviceNotFound: the device is not on this machine, or cannot compute in ``learner.precision``.
    """
    if problem := check_device(config) or check_precision(config):
        raise DeviceNotFound(problem)
    name = device_name(config)
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16(name))
    if name == "cuda":
        from shoal.learner.cuda import CudaPath

        return CudaPath(bfloat16=bfloat16, compile_policy=config.compile)
    return DevicePath(torch.device(name), bfloat16=bfloat16)


def multiplies_bfloat16(device: str) -> bool:
    """True if ``device`` has units for bfloat16 products that make updates faster (``shoal bench kernels``).

    The hardware decides, not a timing: every process of a run, and a run that resumes it, decides the same.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or not runs_bfloat16(device):
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@functools.cache
def runs_bfloat16(device: str) -> bool:
    """True if an LSTM trains in bfloat16 on ``device``; on the CPU a tiny forward and backward pass tries it.

    oneDNN has no bfloat16 LSTM for processors without AVX-512, and none where ONEDNN_MAX_CPU_ISA forbids that.
    """
    if device != "cpu":
        return True
    try:
        # The initial weights of the LSTM must not take numbers from the run's own random stream.
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            output, _ = torch.nn.LSTM(8, 8)(torch.zeros(2, 1, 8))
            output.float().sum().backward()
    except RuntimeError:
        return False
    return True
