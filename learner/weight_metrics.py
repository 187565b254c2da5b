"""Metrics of the weights during training: the signs of a network that is losing its ability to learn.

Read every ``LearnerConfig.weight_metrics_every`` updates by the training loop, never inside an update.
"""

# N rows, U units

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from shoal.policy.regularization import WeightRegularizer, component
from torch import Tensor

RANK_THRESHOLD = 0.99
"""Share of the singular values' sum that an effective rank accounts for."""
DORMANT_THRESHOLD = 0.025
"""Sokar et al.'s tau."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightMetrics:
    """One reading. Every field maps components (``lstm``, ``fc1`` ...) to a number; all are empty before the first."""

    norm: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """L2 norm of the component's parameters."""
    distance_to_init: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """L2 distance of the component's parameters to the regularizer's w0."""
    relative_distance_to_init: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """``distance_to_init`` over the norm of w0; components whose w0 is zero have none."""
    effective_rank: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The lowest ``effective_rank`` of the component's matrices."""
    condition_number: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Largest over smallest singular value, the highest of the component's matrices; inf where one is singular."""
    clipped_fraction: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of the component's bounded weights that lie on their bound; only components that are clipped."""
    dormant_units_ratio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """``dormant_units_ratio`` of the layer's outputs."""


@torch.no_grad()
def measure_weights(regularizer: WeightRegularizer, activations: Mapping[str, Tensor]) -> WeightMetrics:
    """Measure the policy of ``regularizer``, and ``activations`` as ``dormant_units_ratio`` takes them."""
    names = regularizer.parameters.keys()
    # One transfer for all parameters; small matrices are decomposed on the CPU.
    flat = torch.stack([_flat(regularizer.parameters.values()), _flat(regularizer.reference[n] for n in names)]).cpu()
    sizes = [p.numel() for p in regularizer.parameters.values()]
    bounds = regularizer.bounds
    tensors: defaultdict[str, list[_Parameter]] = defaultdict(list)
    for (name, p), pair in zip(regularizer.parameters.items(), flat.split(sizes, 1), strict=True):
        w, w0 = pair.view(2, *p.shape)
        tensors[component(name)].append(_Parameter(w, w0, bounds.get(name)))
    readings: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for part, parameters in tensors.items():
        for field, value in _read(parameters):
            readings[field][part] = value
    return WeightMetrics(**readings, dormant_units_ratio=dormant_units_ratio(activations))


def effective_rank(singular_values: Tensor) -> int:
    """Fewest of the largest singular values that make up 0.99 of the sum of all; 0 for a zero matrix.

    srank of Kumar et al. 2021, "Implicit Under-Parameterization Inhibits Data-Efficient Deep Reinforcement Learning",
    where it is the rank of features; here it is the rank of a weight matrix, as in the original policy's metric.

    Args:
        singular_values: [K], descending.
    """
    shares = singular_values.cumsum(0)
    return int((shares < RANK_THRESHOLD * shares[-1]).sum()) + int(shares[-1] > 0)


@torch.no_grad()
def dormant_units_ratio(activations: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each layer's units whose mean |activation| is at most 0.025 of the layer's mean.

    Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", with their tau.

    Args:
        activations: [N, U] by layer, or [N, U, height, width] for a convolution, whose units are its channels.
    """
    if not activations:
        return {}
    ratios = []
    for values in activations.values():
        activity = values.abs().flatten(2).mean(-1) if values.ndim > 2 else values.abs()
        per_unit = activity.mean(0)
        ratios.append((per_unit <= DORMANT_THRESHOLD * per_unit.mean()).double().mean())
    return dict(zip(activations, torch.stack(ratios).tolist(), strict=True))


class _Parameter(NamedTuple):
    w: Tensor
    w0: Tensor
    bound: float | None


def _read(parameters: list[_Parameter]) -> Iterator[tuple[str, float]]:
    """Yield (field of ``WeightMetrics``, number) for one component."""
    distance, initial = _norm(p.w - p.w0 for p in parameters), _norm(p.w0 for p in parameters)
    yield "norm", _norm(p.w for p in parameters)
    yield "distance_to_init", distance
    if initial:
        yield "relative_distance_to_init", distance / initial
    spectra = [torch.linalg.svdvals(matrix) for p in parameters if (matrix := _matrix(p.w)) is not None]
    if spectra:
        yield "effective_rank", min(map(effective_rank, spectra))
        yield "condition_number", max(float(values[0] / values[-1]) for values in spectra)
    bounded = [(p.w, p.bound) for p in parameters if p.bound is not None]
    if bounded:
        on_bound = sum(int((w.abs() >= bound).sum()) for w, bound in bounded)
        yield "clipped_fraction", on_bound / sum(w.numel() for w, _ in bounded)


def _matrix(w: Tensor) -> Tensor | None:
    """The weights as a matrix, outputs x inputs (a convolution's inputs: channels and places); None for a vector."""
    w = w.squeeze()
    return w.flatten(1) if w.ndim > 1 else None


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(_flat(tensors).norm())
