"""Rows of bytes: observations whose numbers have narrower types than float32, as unrolls carry them.

A row is the numbers' own bytes, one part behind the other without gaps. The network reads float32.
"""

# N numbers of a row, M their bytes

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from shoal.policy.observation import DictObservation, Observation, VectorObservation
from torch import Tensor

_TYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "float16": torch.float16,
    "float32": torch.float32,
}

Parts = tuple[tuple[int, torch.dtype], ...]
"""Numbers and type of each part of a row, in order; empty where rows are what the network reads."""


def parts_of(observation: Observation) -> Parts:
    """The parts of an observation's rows."""
    if isinstance(observation, VectorObservation) and observation.stored != "float32":
        return ((observation.size, _TYPES[observation.stored]),)
    if isinstance(observation, DictObservation) and any(image.dtype == "uint8" for _, image in observation.images):
        images = ((math.prod(image.shape), _TYPES[image.dtype]) for _, image in observation.images)
        return ((observation.numbers.size, torch.float32), *images)
    return ()


def unpack(rows: Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> Tensor:
    """uint8 [..., M] -> float32 [..., N]; parts that are left out at the end are not read."""
    ends = list(itertools.accumulate(size for size, _ in parts))
    found = rows.new_empty((*rows.shape[:-1], ends[-1]), dtype=torch.float32)
    start = 0
    for (size, dtype), end in zip(parts, ends, strict=True):
        stop = start + size * dtype.itemsize
        part = rows[..., start:stop]
        if dtype != torch.uint8:
            # A copy begins where a view of its type may begin.
            part = part.clone(memory_format=torch.contiguous_format).view(dtype)
        found[..., end - size : end] = part
        start = stop
    return found
