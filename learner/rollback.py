"""Undoes an update that fails after some of its optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Rollback:
    """Keeps copies of a policy's tensors and of the optimizer's state, in memory that is reused.

    Args:
        weights: parameters and statistics.
    """

    def __init__(self, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._weights, self._optimizer = weights, optimizer
        self._saved: list[Tensor] = []

    @contextlib.contextmanager
    def on(self, *errors: type[Exception]) -> Iterator[None]:
        """Restore weights and optimizer state if the block raises one of ``errors``, and raise it again."""
        state = self._optimizer.state
        fresh = not state
        tensors = [*self._weights, *(t for p in self._weights for t in state.get(p, {}).values())]
        if len(self._saved) != len(tensors):
            self._saved = [torch.empty_like(t) for t in tensors]
        with torch.no_grad():
            torch._foreach_copy_(self._saved, tensors)
        try:
            yield
        except errors:
            with torch.no_grad():
                torch._foreach_copy_(tensors, self._saved)
            if fresh:
                state.clear()
            raise
