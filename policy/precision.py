"""What stays float32 where an update computes in bfloat16, because bfloat16 is slower there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_COLUMNS = 16
"""Products with fewer take longer in bfloat16 than in float32."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, whatever autocast made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tanh(x: Tensor) -> Tensor:
    """In float32 at least: of bfloat16 it takes four times as long on a CPU."""
    return torch.tanh(at_least_float32(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, I], weight [O, I] -> [N, O], in float32 at least where O is small."""
    if len(weight) >= FEW_COLUMNS or not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(at_least_float32(x), weight, bias)
