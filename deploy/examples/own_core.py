"""A core of one's own: a memory that shoal carries, resets, ships and checkpoints as it does its LSTM's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import shoal
import torch
import yaml
from torch import Tensor, nn


class Traces(shoal.Core):
    """Averages of what was seen, at ``rates`` rates each: from the last step alone to the last hundred.

    A core names its state in ``state_shapes`` and makes one ``step``; ``shoal.Core`` unrolls it through time, with
    resets inside. A faster ``unroll`` of its own is optional. No row may depend on another row.
    """

    keep: Tensor

    def __init__(self, input_size: int, hidden_size: int, rates: int = 4) -> None:
        super().__init__(input_size, hidden_size)
        self.read = nn.Linear(input_size, hidden_size)
        self.mix = nn.Linear(rates * hidden_size, hidden_size)
        self.register_buffer("keep", 1 - torch.logspace(0, -2, rates)[:, None], persistent=False)

    @property
    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """One environment's state by name; the first dimension counts layers."""
        return {"traces": (1, len(self.keep), self.hidden_size)}

    def step(self, x: Tensor, is_first: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, inputs], is_first bool [B], state [1, B, rates, H] -> output [B, H], state."""
        [traces] = shoal.zeroed(state, is_first)
        new = torch.tanh(self.read(x))[:, None].to(traces.dtype)
        after = self.keep * traces[0] + (1 - self.keep) * new
        return torch.tanh(self.mix(after.flatten(1))), (after[None],)


def main(**settings: Any) -> shoal.Run:
    """Train it on an environment that cannot be solved without a memory."""
    run = shoal.train(
        "recall",
        core=Traces,
        config={"policy.core_kwargs": {"rates": 5}, "total_env_steps": 400_000},
        **settings,
    )
    print(f"with {type(run.policy.network.core).__name__}: {run.summary['mean_return']}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
