"""A convolution over a box of tokens, computed from the tokens themselves; compiled by numba, which must be installed.

A box of 11 x 11 cells and 25 planes has 3,025 numbers, of which some 30 tokens set as many: the product of its patches
with the weights is nearly all zeros. Here each number that a token sets is multiplied with a row of the weights for
every patch that it is in. The numbers of a box are taken in the box's order, whatever the order of the tokens, so equal
boxes give equal bits. Of several tokens in one place the last one counts.

N rows, M tokens, Q patches, K cells of a kernel, P planes, C channels. ``entries`` [.., 2] are (patch, cell of the
kernel) of the cells of the box, those of cell ``i`` from ``starts[i]`` to ``starts[i + 1]``. ``cells`` [256] is the
cell of a coordinate byte, ``planes`` [65536] the plane and ``magnitudes`` [65536] the number of a feature and value; -1
has no place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

ROWS_PER_SUM = 256
"""Gradients of so many rows are summed before they are added to the others: float32 loses less so."""

_TABLES = "i4[::1], i4[::1], f4[::1], i4[::1], i4[:, ::1], i8"
# Products and sums may be fused; nothing is reordered.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}}

# A word with one bit set, times this, has the bit's number in a form of its own in the upper six bits (de Bruijn).
_SEQUENCE = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.zeros(64, np.int64)
_BIT_OF[[(int(_SEQUENCE) << bit & 0xFFFFFFFFFFFFFFFF) >> 58 for bit in range(64)]] = np.arange(64)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile once per machine: numba keeps the result beside this file or else in the user's cache."""

    def compile_(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, **_OPTIONS)(function)
        except RuntimeError:  # neither can be written
            return numba.njit(signature, **_OPTIONS)(function)

    return compile_


@_compiled("i8(u1[:, ::1], i4[::1], i4[::1], f4[::1], i8, u8[::1], f4[::1], i4[::1])")
def _places(
    tokens: np.ndarray,
    cells: np.ndarray,
    planes: np.ndarray,
    magnitudes: np.ndarray,
    num_planes: int,
    marks: np.ndarray,
    box: np.ndarray,
    places: np.ndarray,
) -> int:
    """Write one row's tokens, uint8 [M, 3], to ``box`` [cells * P], and the indices that were written, ascending, to
    ``places``; their number. ``marks``, a bit for each index, is all 0 before and after."""
    for token in range(len(tokens)):
        cell = cells[tokens[token, 0]]
        key = np.int32(tokens[token, 1]) << 8 | tokens[token, 2]
        plane = planes[key]
        if cell >= 0 and plane >= 0:
            index = cell * num_planes + plane
            box[index] = magnitudes[key]
            marks[index >> 6] |= np.uint64(1) << np.uint64(index & 63)
    count = 0
    for word in range(len(marks)):
        left = marks[word]
        marks[word] = np.uint64(0)
        while left:
            lowest = left & (~left + np.uint64(1))
            places[count] = (word << 6) + _BIT_OF[(lowest * _SEQUENCE) >> np.uint64(58)]
            left ^= lowest
            count += 1
    return count


@_compiled(f"void(u1[:, :, ::1], {_TABLES}, f4[:, ::1], f4[::1], f4[:, :, ::1])")
def forward(
    tokens: np.ndarray,  # uint8 [N, M, 3]
    cells: np.ndarray,
    planes: np.ndarray,
    magnitudes: np.ndarray,
    starts: np.ndarray,
    entries: np.ndarray,
    num_planes: int,
    weights: np.ndarray,  # [K * P, C]
    bias: np.ndarray,  # [C]
    out: np.ndarray,  # [N, Q, C], written
) -> None:
    """The layer's output."""
    size = (len(starts) - 1) * num_planes
    marks, box, places = np.zeros((size + 63) // 64, np.uint64), np.empty(size, np.float32), np.empty(size, np.int32)
    channels = len(bias)
    for row in range(len(tokens)):
        for patch in range(out.shape[1]):
            for channel in range(channels):
                out[row, patch, channel] = bias[channel]
        for i in range(_places(tokens[row], cells, planes, magnitudes, num_planes, marks, box, places)):
            magnitude, cell = box[places[i]], places[i] // num_planes
            plane = places[i] - cell * num_planes
            for entry in range(starts[cell], starts[cell + 1]):
                patch, weight = entries[entry, 0], entries[entry, 1] * num_planes + plane
                for channel in range(channels):
                    out[row, patch, channel] += magnitude * weights[weight, channel]


@_compiled(f"void(u1[:, :, ::1], {_TABLES}, f4[:, :, ::1], f4[:, ::1])")
def backward(
    tokens: np.ndarray,
    cells: np.ndarray,
    planes: np.ndarray,
    magnitudes: np.ndarray,
    starts: np.ndarray,
    entries: np.ndarray,
    num_planes: int,
    out: np.ndarray,  # [N, Q, C]: gradients of the output
    weights: np.ndarray,  # [K * P, C]: gradients of the weights, added to
) -> None:
    """The gradients of the weights."""
    size = (len(starts) - 1) * num_planes
    marks, box, places = np.zeros((size + 63) // 64, np.uint64), np.empty(size, np.float32), np.empty(size, np.int32)
    some = np.zeros_like(weights)
    channels = out.shape[2]
    for row in range(len(tokens)):
        for i in range(_places(tokens[row], cells, planes, magnitudes, num_planes, marks, box, places)):
            magnitude, cell = box[places[i]], places[i] // num_planes
            plane = places[i] - cell * num_planes
            for entry in range(starts[cell], starts[cell + 1]):
                patch, weight = entries[entry, 0], entries[entry, 1] * num_planes + plane
                for channel in range(channels):
                    some[weight, channel] += magnitude * out[row, patch, channel]
        if row % ROWS_PER_SUM == ROWS_PER_SUM - 1 or row == len(tokens) - 1:
            for weight in range(len(weights)):
                for channel in range(channels):
                    weights[weight, channel] += some[weight, channel]
                    some[weight, channel] = 0.0
