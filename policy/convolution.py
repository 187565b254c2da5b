"""Convolutions over windows and pictures of any size: kernels that fit, and what comes out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def convolution_geometry(
    height: int, width: int, kernel: int, stride: int, *, whole: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """(kernel, padding of ``F.pad``, height and width of the output) for boxes of ``height`` x ``width``.

    The kernel is smaller where the box is. ``whole`` adds zero columns and rows where the stride would drop cells.
    """
    size = (min(kernel, height), min(kernel, width))
    pad = (0, -(width - size[1]) % stride, 0, -(height - size[0]) % stride) if whole else (0, 0, 0, 0)
    out = ((height + pad[3] - size[0]) // stride + 1, (width + pad[1] - size[1]) // stride + 1)
    return size, pad, out


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer(x)``; where the kernel covers its whole input, as the matrix product that it is, which costs a third."""
    if x.shape[-2:] != layer.kernel_size:
        # Not layer(x): a layer may have its own forward, which calls this.
        return F.conv2d(x, layer.weight, layer.bias, layer.stride)
    return F.linear(x.flatten(1), layer.weight.flatten(1), layer.bias)[..., None, None]
