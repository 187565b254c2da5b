"""Convolutions over windows and pictures of any size: kernels that fit, and what comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_OVERLAP = 3
"""Patches in which a cell comes up this often on average are left to a convolution; tokens have 25 / 9."""


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
    """``layer(x)``; where its patches overlap little, as the matrix product of patches and weights that it is.

    For a box of tokens that costs a half of a convolution with its gradient in float32, a third in bfloat16 (``shoal
    bench kernels``); patches that overlap much, as those of pictures do, cost more to write down than they save.
    """
    (height, width), (down, right) = layer.kernel_size, layer.stride
    if x.shape[-2:] == layer.kernel_size:
        patches = x.permute(0, 2, 3, 1)[:, None, None]
    elif height * width < MOST_OVERLAP * down * right:
        if torch.is_autocast_enabled(x.device.type):  # a cell is in more than one patch: rounded once, moved as half
            x = x.to(torch.get_autocast_dtype(x.device.type))
        patches = x.unfold(2, height, down).unfold(3, width, right).permute(0, 2, 3, 4, 5, 1)
    else:
        # Not layer(x): a layer may have its own forward, which calls this.
        return F.conv2d(x, layer.weight, layer.bias, layer.stride)
    # Channels come last, as in the box that tokens make, and in what this gives.
    y = F.linear(patches.flatten(3), layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)
    return y.permute(0, 3, 1, 2)
