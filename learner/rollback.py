"""Undoes an update that fails after some of its optimizer steps."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

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
        tensors = [*self._weights]
        # An optimizer of the user's may keep lists of tensors, and entries that are no parameter's.
        kept = {key: _containers_copied(entry, tensors) for key, entry in state.items()}
        if [(t.shape, t.dtype, t.device) for t in self._saved] != [(t.shape, t.dtype, t.device) for t in tensors]:
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
            state.update(kept)
            raise


def _containers_copied(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with copies of its mappings and lists, which hold the same tensors; these are added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _containers_copied(part, tensors) for key, part in value.items()})
        return copied
    if isinstance(value, list | tuple):
        return type(value)([_containers_copied(part, tensors) for part in value])
    return value
