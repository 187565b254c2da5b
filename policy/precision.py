"""Operations kept in float32 during bfloat16 autocast, because bfloat16 is slower for them."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_COLUMNS = 16
"""Matrix products with fewer output columns take longer in bfloat16 than in float32."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh`` in float32 or wider: in bfloat16 it takes four times as long on a CPU."""
    return torch.tanh(at_least_float32(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I], weight [O, I] -> [N, O], in float32 or wider if O is less than ``FEW_COLUMNS``."""
    if len(weight) >= FEW_COLUMNS or not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(at_least_float32(x), weight, bias)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which nothing is cast to bfloat16; costs nothing where nothing would be."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
