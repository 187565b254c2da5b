"""The first convolution of a token policy, from the tokens instead of the box that they are placed in."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from shoal.policy.tokens import TokensToBox
from torch import Tensor, nn


@functools.cache
def available() -> bool:
    """Whether numba is installed (``shoal[tokens]``)."""
    return importlib.util.find_spec("numba") is not None


class TokenConvolution:
    """``layer`` after ``box``, and after padding with zeros to a whole number of strides; equal within rounding.

    ``shoal bench kernels`` measures what it saves. It computes in float32 also where the rest of the network is in
    bfloat16.

    Args:
        box: the tokens' places.
        out: height and width of the layer's output.
        layer: its kernel and stride; the weights are read at each call.
        scale: what the numbers in the box are divided by, [planes]; None divides by nothing.
    """

    def __init__(self, box: TokensToBox, layer: nn.Conv2d, out: tuple[int, int], scale: Tensor | None = None) -> None:
        self._out, self._num_planes = out, box.num_planes
        cells, planes, magnitudes = box.tables()
        if scale is not None:
            placed = planes >= 0
            magnitudes[placed] /= scale.numpy()[planes[placed]]
        starts, entries = _patches(box.height, box.width, layer, out)
        self._tables = (cells, planes, magnitudes, starts, entries, self._num_planes)

    def applies(self, obs: Tensor, layer: nn.Conv2d) -> bool:
        """Whether these tokens and weights are for it: on a CPU, float32, and computed rather than traced."""
        if torch.compiler.is_compiling():
            return False
        weight = layer.weight
        return (
            obs.device.type == weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and type(obs) is Tensor
            and available()
        )

    def __call__(self, obs: Tensor, layer: nn.Conv2d) -> Tensor:
        """uint8 [N, tokens, 3] -> float32 [N, C, height, width], channels last in memory."""
        assert layer.bias is not None
        if torch.is_grad_enabled() and layer.weight.requires_grad:
            y = _Convolve.apply(obs, layer.weight, layer.bias, self._tables, self._out)
        else:
            y = _convolve(obs.contiguous().numpy(), layer.weight, layer.bias, self._tables, self._out)
        return y.unflatten(1, self._out).permute(0, 3, 1, 2)


def _convolve(tokens: np.ndarray, weight: Tensor, bias: Tensor, tables: Any, out: tuple[int, int]) -> Tensor:
    """Float32 [N, Q, C]."""
    from shoal.policy.token_kernels import forward  # takes half a second

    # [K * P, C]
    rows = weight.detach().flatten(2).permute(2, 1, 0).contiguous().view(-1, len(bias))
    result = torch.empty(len(tokens), out[0] * out[1], len(bias))
    forward(tokens, *tables, rows.numpy(), bias.detach().contiguous().numpy(), result.numpy())
    return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, obs: Tensor, weight: Tensor, bias: Tensor, tables: Any, out: tuple[int, int]) -> Tensor:
        ctx.tokens, ctx.tables, ctx.shape = obs.contiguous().numpy(), tables, weight.shape
        return _convolve(ctx.tokens, weight, bias, tables, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from shoal.policy.token_kernels import backward

        channels, planes, height, width = ctx.shape
        grad = grad.contiguous()
        rows = torch.zeros(height * width * planes, channels)
        backward(ctx.tokens, *ctx.tables, grad.numpy(), rows.numpy())
        weight = rows.view(-1, planes, channels).permute(2, 1, 0).contiguous().view(ctx.shape)
        return None, weight, grad.sum((0, 1)), None, None


def _patches(height: int, width: int, layer: nn.Conv2d, out: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """``starts`` and ``entries`` of ``policy.token_kernels``, both int32."""
    (kernel_height, kernel_width), (down, right) = layer.kernel_size, layer.stride
    starts, entries = [0], []
    for row in range(height):
        for column in range(width):
            entries += [
                (y * out[1] + x, (row - y * down) * kernel_width + column - x * right)
                for y in range(out[0])
                for x in range(out[1])
                if 0 <= row - y * down < kernel_height and 0 <= column - x * right < kernel_width
            ]
            starts.append(len(entries))
    return np.array(starts, np.int32), np.array(entries, np.int32).reshape(-1, 2)
