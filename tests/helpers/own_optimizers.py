"""An optimizer of a user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Descent(torch.optim.Optimizer):
    """Gradient descent that counts its steps by parameter, in a list, and for all."""

    def __init__(self, params: Any, lr: float, *, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        state: Any = self.state
        state.setdefault("steps", torch.zeros(()))
        state["steps"] += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                [mean] = state[parameter].setdefault("moments", [torch.zeros_like(parameter)])
                mean.mul_(group["momentum"]).add_(parameter.grad)
                parameter.sub_(mean / state["steps"], alpha=group["lr"])
