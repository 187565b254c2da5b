"""Cores of a user's, by the names that an import finds: one that fits, and those that do not."""

from __future__ import annotations

from typing import Any

import shoal
import torch
from shoal.policy.resets import State, zeroed
from torch import Tensor, nn


class Leaky(shoal.Core):
    """One layer that forgets at rates that it learns; a state of another rank, and a count of the steps beside it."""

    def __init__(self, input_size: int, hidden_size: int, halves: int = 2) -> None:
        super().__init__(input_size, hidden_size)
        self.halves = halves
        self.read = nn.Linear(input_size, hidden_size)
        self.rate = nn.Parameter(torch.zeros(hidden_size))

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"trace": (1, self.halves, self.hidden_size // self.halves), "age": (1, 1)}

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        trace, age = zeroed(state, is_first)
        rate = self.rate.sigmoid()
        # Autocast computes the product in bfloat16; the state keeps its dtype.
        kept = trace[0].flatten(1) * rate + (1 - rate) * self.read(x).to(trace.dtype)
        age = age + 1
        y = torch.tanh(2 * kept) / (1 + 0.01 * age[0])
        return y, (kept.view_as(trace[0])[None], age)


class Faulty(Leaky):
    """Something is wrong with it."""

    fault = ""

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().state_shapes
        return {
            "no layers": {"trace": (self.hidden_size,), "age": (1, 1)},
            "taken name": {"obs": shapes["trace"], "age": (1, 1)},
            "bad name": {"My State": shapes["trace"], "age": (1, 1)},
            "nothing": {},
        }.get(self.fault, shapes)

    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        if self.fault == "never resets":
            is_first = torch.zeros_like(is_first)
        if self.fault == "multiplies":
            is_first, state = (
                torch.zeros_like(is_first),
                tuple(part * (~is_first).view(1, -1, *[1] * (part.dim() - 2)) for part in state),
            )
        if self.fault == "looks at others":
            x = x - x.mean(0)
        if self.fault == "draws":
            x = x + torch.randn(())
        if self.fault == "breaks":
            x = x[:, :1]
        y, (trace, age) = super().step(x, is_first, state)
        if self.fault == "column":
            y = y[:, :1]
        if self.fault == "grows":
            trace = trace.repeat(1, 1, 1, 2)
        if self.fault == "double":
            age = age.double()
        return y, (trace, age)

    def unroll(self, x: Tensor, plan: Any, is_first: Tensor, state: State, *, return_state: bool = True) -> Any:
        if self.fault == "forgets resets":
            is_first = torch.zeros_like(is_first)
        y, last = super().unroll(x, plan, is_first, state, return_state=return_state)
        assert last is not None
        if self.fault == "last state":
            last = tuple(part + 1 for part in last)
        if self.fault == "no state":
            return y, None
        if self.fault == "final rows left out":
            y = y[: is_first.numel()]
        return y, last


def faulty(fault: str) -> type[Faulty]:
    return type("Faulty", (Faulty,), {"fault": fault})


class OtherSize(Leaky):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, 2 * hidden_size)


class Nameless(shoal.Core):
    def step(self, x: Tensor, is_first: Tensor, state: State) -> tuple[Tensor, State]:
        return x, state


class Stranger(nn.Module):
    pass
