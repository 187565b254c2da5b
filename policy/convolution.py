"""Convolutions over token windows and images of any size: kernel, padding and output size, the product itself, and
sections of a residual network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shoal.policy.initialization import initialize_layer
from torch import Tensor, nn

MOST_OVERLAP = 3
"""Use ``F.conv2d`` if each cell lies in this many patches or more on average; for tokens it is 25 / 9."""


def convolution_geometry(
    height: int, width: int, kernel: int, stride: int, *, whole: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """(kernel, padding of ``F.pad``, height and width of the output) for boxes of ``height`` x ``width``.

    The kernel is reduced to the box's size if that is smaller. With ``whole``, zero columns and rows are added
    so that the stride drops no cells.
    """
    size = (min(kernel, height), min(kernel, width))
    pad = (0, -(width - size[1]) % stride, 0, -(height - size[0]) % stride) if whole else (0, 0, 0, 0)
    out = ((height + pad[3] - size[0]) // stride + 1, (width + pad[1] - size[1]) // stride + 1)
    return size, pad, out


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``layer(x)``, computed as a matrix product of patches and weights if the patches overlap little.

    ``x`` is [N, C, height, width]. With its gradient, a box of tokens takes half the time of ``F.conv2d`` in float32
    and a third in bfloat16 (``shoal bench kernels``). Patches that overlap much, as in images, cost more to copy than
    they save.
    """
    (height, width), (down, right) = layer.kernel_size, layer.stride
    if x.shape[-2:] == layer.kernel_size:
        patches = x.permute(0, 2, 3, 1)[:, None, None]
    elif height * width < MOST_OVERLAP * down * right:
        if torch.is_autocast_enabled(x.device.type):  # a cell is in several patches: round it once, copy half the bytes
            x = x.to(torch.get_autocast_dtype(x.device.type))
        patches = x.unfold(2, height, down).unfold(3, width, right).permute(0, 2, 3, 4, 5, 1)
    else:
        # Not layer(x): a layer may have its own forward, which calls this.
        return F.conv2d(x, layer.weight, layer.bias, layer.stride)
    # Channels last in memory, as in the box of tokens and in the result.
    y = F.linear(patches.flatten(3), layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)
    return y.permute(0, 3, 1, 2)


class ResidualSection(nn.Module):
    """[N, planes, height, width] -> [N, channels, ceil(height / 2), ceil(width / 2)]: a section of IMPALA's residual
    network (Espeholt et al. 2018, figure 3, right).

    A convolution, max pooling that halves the sides, and two residual blocks, all 3 x 3. There is zero padding around
    the convolutions, so that one pixel is left of the smallest image, and no normalization, by which a row would
    depend on the others.
    """

    def __init__(self, planes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(planes, channels, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.block1_conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block1_conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2_conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2_conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    @staticmethod
    def sides(height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        return (height + 1) // 2, (width + 1) // 2

    def initialize(self, stream: torch.Generator, *, scheme: str = "orthogonal", gain: float = 1.0) -> None:
        """Initialise every convolution as ``initialize_layer`` does."""
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                initialize_layer(layer, stream, scheme=scheme, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """The sum that the second block gives, without an activation."""
        x = self.pool(self.conv(x))
        x = x + self.block1_conv2(F.relu(self.block1_conv1(F.relu(x))))
        return x + self.block2_conv2(F.relu(self.block2_conv1(F.relu(x))))
