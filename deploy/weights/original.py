"""Weights of the original policies (Metta-AI/metta, August 2025): which of their tensors is which of ours.

Both had the layers of ``FastPolicy`` under other names, wrapped in modules whose names come and go with the version.
What matters of a name is the component and the tensor in it; shapes are checked by whoever loads the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Parts of names that only say how modules were wrapped.
_WRAPPERS = frozenset(("module", "_orig_mod", "policy", "components", "_net", "net", "weight_net"))
_COMPONENTS = {
    "_core_": "lstm",
    "_value_": "value_head",
    "_action_embeds_": "action_embeddings",
}
_TENSORS = {"_action_.W": "actor_W", "_action_.bias": "actor_bias"}
# Of the original ComponentPolicy alone: it gave actions embedding rows from 1, FastPolicy from 0.
_FROM_ONE = frozenset(("_core_", "_value_", "_action_embeds_", "_action_"))
# Tensors that are no weights, by the last part of their names.
_SCALES, _ROWS = ("obs_norm", "max_vec"), "active_indices"
_TABLES = ("action_index_tensor", "cum_action_max_params")


class OriginalError(ValueError):
    """Tensors that are not the weights of an original policy, or not clearly."""


class OriginalWeights(NamedTuple):
    """Contents of an original policy's file."""

    weights: dict[str, Tensor]
    """float32, under our names."""
    first_row: int
    """The embedding row of the first action."""
    rows: tuple[int, ...] | None
    """The embedding row of every action, where it was saved."""
    normalizations: tuple[float, ...] | None
    """Normalization by feature id, where saved."""


def read_original(saved: Mapping[str, Tensor], expected: Collection[str]) -> OriginalWeights:
    """Match the tensors of an original's ``state_dict`` with the names ``expected``.

    Raises:
        OriginalError: tensors are missing, left over or not finite, or two different ones could be the same; all are
            listed.
    """
    weights: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    left_over, ambiguous = [], []
    scales: tuple[float, ...] | None = None
    rows: tuple[int, ...] | None = None
    first_row = 0
    for name, tensor in saved.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS and not part.isdecimal()]
        if not parts or parts[-1] in _TABLES:
            continue
        first_row = max(first_row, int(parts[0] in _FROM_ONE))
        if parts[-1] in _SCALES:
            scales = tuple(tensor.flatten().tolist())
        elif parts[-1] == _ROWS:
            rows = tuple(tensor.tolist()) or None
        elif (ours := _our_name(parts)) not in expected:
            left_over.append(name)
        elif ours in weights and not torch.equal(weights[ours], tensor.float()):
            ambiguous.append(f"{ours} is {source[ours]} or {name}")
        else:
            weights[ours], source[ours] = tensor.float(), name
    # LSTM wrappers keep a cell that shares the LSTM's tensors.
    known = list(weights.values())
    left_over = [name for name in left_over if not any(torch.equal(w, saved[name].float()) for w in known)]
    missing = [name for name in expected if name not in weights]
    infinite = [source[name] for name, tensor in weights.items() if not tensor.isfinite().all()]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("nothing was found for", missing),
            ("nothing is known of", left_over),
            ("it is not clear which to take", ambiguous),
            ("not finite", infinite),
        )
        if names
    ]
    if problems:
        raise OriginalError("these are not the weights of an original policy:\n  " + "\n  ".join(problems))
    return OriginalWeights(weights, first_row, rows, scales)


def _our_name(parts: list[str]) -> str:
    component, tensor = parts[0], parts[-1]
    if len(parts) == 1:
        return component
    return _TENSORS.get(f"{component}.{tensor}", f"{_COMPONENTS.get(component, component)}.{tensor}")
