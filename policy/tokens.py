"""TokensToBox: the first layer of the token policies, without parameters."""

from __future__ import annotations

import numpy as np
import torch
from shoal.policy.observation import TokenObservation
from torch import Tensor, nn

PADDING = 0xFF
_PLACED, _NOWHERE, _PADDING, _LEFT_OUT, _SOME_VALUES = range(5)
"""Kinds of coordinate or feature bytes: placed, without a place, padding, left out on purpose, value decides."""


class TokensToBox(nn.Module):
    """uint8 [N, tokens, 3] -> float32 [N, planes, height, width], channels last; never writes to its input.

    Placement and normalization are table look-ups: the coordinate byte gives the cell; (feature, value) gives the plane
    and the number to write. Tokens without a place go to one spare element behind the box, so padding and unknown
    tokens overwrite nothing.

    Planes, their order and their normalizations follow ``trained``. Feature and value ids, coordinates and left-out
    tokens follow ``presented`` (by default ``trained``), matched by name, so that weights can read features in another
    order. The matching is part of the tables and costs nothing per step.

    Raises:
        ValueError: ``presented`` cannot be matched (``TokenObservation.planes_of``).
    """

    def __init__(self, trained: TokenObservation, presented: TokenObservation | None = None) -> None:
        super().__init__()
        presented = trained if presented is None else presented
        self.num_planes = len(trained.planes)
        self.height, self.width = trained.height, trained.width
        self._size = self.num_planes * self.height * self.width
        self._left_out = 3 * self._size
        cell = torch.full((256,), self._size, dtype=torch.int64)
        for row in range(self.height):
            for column in range(self.width):
                cell[row << 4 | column] = (row * self.width + column) * self.num_planes
        if presented.global_coordinate is not None:
            centre = (self.height // 2) * self.width + self.width // 2
            cell[presented.global_coordinate] = centre * self.num_planes
        # 0xFF is padding even in a 16x16 window, where its nibbles would name the last cell.
        cell[PADDING] = self._size
        plane = torch.full((256, 256), self._size, dtype=torch.int64)
        magnitude = torch.zeros(256, 256)
        values = torch.arange(256, dtype=torch.float32)
        normalization = [trained.feature_normalizations[feature] for feature, _ in trained.planes]
        for feature, value, index in trained.planes_of(presented):
            if value is None:
                plane[feature] = index
                magnitude[feature] = values / (normalization[index] or 1.0)
            else:
                plane[feature, value] = index
                magnitude[feature, value] = 1.0
        for feature, value in presented.left_out:
            plane[feature, slice(None) if value is None else value] = self._left_out
        self._cell: Tensor
        self._plane: Tensor
        self._magnitude: Tensor
        self.register_buffer("_cell", cell, persistent=False)
        self.register_buffer("_plane", plane.flatten(), persistent=False)
        self.register_buffer("_magnitude", magnitude.flatten(), persistent=False)
        self._coordinate_kind = (cell == self._size).to(torch.uint8).numpy()
        self._coordinate_kind[PADDING] = _PADDING
        kinds = torch.full((256,), _SOME_VALUES, dtype=torch.uint8)
        kinds[(plane < self._size).all(1)] = _PLACED
        kinds[(plane == self._size).all(1)] = _NOWHERE
        kinds[(plane == self._left_out).all(1)] = _LEFT_OUT
        self._feature_kind = kinds.numpy()

    def _place(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each token: its position among N * M, its index into one row's box, and the number to write there.

        An index of the box's size or more means no place; three times its size or more means left out on purpose. On
        the CPU, padding (most tokens) is dropped first; on a GPU that would cost a synchronisation, and in an exported
        graph a shape that depends on values.
        """
        tokens = obs.reshape(-1, 3)
        if _in_token_order(obs):
            position = (tokens[:, 0] != PADDING).nonzero().squeeze(1)
            tokens = tokens.index_select(0, position).long()
        else:
            position = torch.arange(tokens.shape[0], device=obs.device)  # len() would fix it in an exported graph
            tokens = tokens.long()
        key = tokens[:, 1] << 8 | tokens[:, 2]
        place = self._cell.index_select(0, tokens[:, 0]) + self._plane.index_select(0, key)
        return position, place, self._magnitude.index_select(0, key)

    def forward(self, obs: Tensor) -> Tensor:
        """Place each row's tokens: uint8 [N, tokens, 3] -> float32 [N, planes, height, width]."""
        rows, tokens_per_row = obs.shape[:2]
        position, place, magnitude = self._place(obs)
        spare = rows * self._size
        index = torch.where(place < self._size, place + position // tokens_per_row * self._size, spare)
        if not _in_token_order(obs):
            magnitude = magnitude[last_write(index, spare + 1)]
        # On the CPU one thread writes in token order, so the last write wins by itself.
        box = magnitude.new_zeros(spare + 1).scatter_(0, index, magnitude)
        return box[:-1].view(rows, self.height, self.width, self.num_planes).permute(0, 3, 1, 2)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies, for tokens of each byte: the cell by coordinate [256], row by row; the plane [65536] and the number
        to write [65536] by feature and value. int32, int32, float32; -1 has no place."""
        cells, planes = self._cell.numpy(), self._plane.numpy()
        return (
            np.where(cells < self._size, cells // self.num_planes, -1).astype(np.int32),
            np.where(planes < self._size, planes, -1).astype(np.int32),
            self._magnitude.numpy().copy(),
        )

    def count_ignored(self, obs: np.ndarray) -> int:
        """Count the unexpected tokens in ``obs``, uint8 [..., tokens, 3]: those without a place that are neither
        padding nor left out on purpose. Translating bytes is fast enough to check every observation of an actor."""
        tokens = obs.reshape(-1, 3)
        where = _translate(tokens[:, 0], self._coordinate_kind)
        what = _translate(tokens[:, 1], self._feature_kind)
        used = where != _PADDING
        ignored = int(np.count_nonzero(used & (what != _LEFT_OUT) & (what != _SOME_VALUES) & (where | what != _PLACED)))
        some = np.flatnonzero(used & (what == _SOME_VALUES))
        if len(some):
            plane = self._plane.view(256, 256).numpy()[tokens[some, 1], tokens[some, 2]]
            expected = (plane == self._left_out) | ((plane != self._size) & (where[some] == _PLACED))
            ignored += int(np.count_nonzero(~expected))
        return ignored


def _in_token_order(obs: Tensor) -> bool:
    """Whether tokens are written one after the other: not on a GPU, and not by whatever runs an exported graph."""
    return obs.device.type == "cpu" and not torch.compiler.is_exporting()


def _translate(column: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return ``table[column]``, several times as fast."""
    return np.frombuffer(column.tobytes().translate(table.tobytes()), np.uint8)


def last_write(index: Tensor, size: int) -> Tensor:
    """For each position p of ``index`` [M], the last position that writes to ``index[p]``; int64 [M].

    Makes a scatter deterministic where the order of writes is not (on a GPU): all writers of a cell write one value.
    """
    position = torch.arange(index.numel(), device=index.device)
    winner = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    winner.scatter_reduce_(0, index, position, reduce="amax")
    return winner[index]
