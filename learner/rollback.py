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
        kept = [(p, name, value) for p in self._weights for name, value in state.get(p, {}).items()]
        tensors = [*self._weights, *(value for _, _, value in kept if isinstance(value, Tensor))]
        if len(self._saved) != len(tensors):
            self._saved = [torch.empty_like(t) for t in tensors]
        with torch.no_grad():
            torch._foreach_copy_(self._saved, tensors)
        try:
            yield
        except errors:
            with torch.no_grad():
                torch._foreach_copy_(tensors, self._saved)
            # Entries are put back, too: some optimizers replace numbers and tensors by new ones.
            state.clear()
            for parameter, name, value in kept:
                state[parameter][name] = value
            raise
