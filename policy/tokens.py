"""Tokens to box: the first, parameter-free layer of the token policies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.observation import TokenObservation

PADDING = 0xFF


class TokensToBox(nn.Module):
    """uint8 [N, tokens, 3] -> float32 [N, planes, height, width]; never writes to its input.

    Placement and normalization are one table look-up each: by coordinate byte the cell, by (feature, value) the plane
    and the number to put there. Whatever has no place goes to one spare element behind the box, so padding and
    unknown tokens erase nothing.
    """

    def __init__(self, observation: TokenObservation) -> None:
        super().__init__()
        self.num_planes = len(observation.planes)
        self.height, self.width = observation.height, observation.width
        cells = self.height * self.width
        self._size = self.num_planes * cells
        cell = torch.full((256,), self._size, dtype=torch.int64)
        for row in range(self.height):
            for column in range(self.width):
                cell[row << 4 | column] = row * self.width + column
        if observation.global_coordinate is not None:
            cell[observation.global_coordinate] = (self.height // 2) * self.width + self.width // 2
        # 0xFF is padding even in a 16x16 window, where its nibbles would name the last cell.
        cell[PADDING] = self._size
        plane = torch.full((256, 256), self._size, dtype=torch.int64)
        magnitude = torch.zeros(256, 256)
        values = torch.arange(256, dtype=torch.float32)
        for index, (feature, value) in enumerate(observation.planes):
            if value is None:
                plane[feature] = index * cells
                magnitude[feature] = values / observation.feature_normalizations[feature]
            else:
                plane[feature, value] = index * cells
                magnitude[feature, value] = 1.0
        self.register_buffer("_cell", cell, persistent=False)
        self.register_buffer("_plane", plane.flatten(), persistent=False)
        self.register_buffer("_magnitude", magnitude.flatten(), persistent=False)

    def _place(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """(index into one row's box, or >= its size where the token has no place; (feature, value) key), both [N, M]."""
        tokens = obs.long()
        key = tokens[..., 1] * 256 + tokens[..., 2]
        return self._cell[tokens[..., 0]] + self._plane[key], key

    def forward(self, obs: Tensor) -> Tensor:
        """The box of every row."""
        place, key = self._place(obs)
        rows = obs.shape[0]
        offset = torch.arange(0, rows * self._size, self._size, device=obs.device).unsqueeze(1)
        index = torch.where(place < self._size, place + offset, rows * self._size).flatten()
        box = self._write(index, self._magnitude[key].flatten(), rows * self._size + 1)
        return box[:-1].view(rows, self.num_planes, self.height, self.width)

    def _write(self, index: Tensor, value: Tensor, size: int) -> Tensor:
        box = torch.zeros(size, device=value.device)
        if index.device.type == "cpu":
            return box.scatter_(0, index, value)  # one thread, in token order: the last write wins
        return box.scatter_(0, index, value[last_write(index, size)])

    def count_ignored(self, obs: Tensor) -> Tensor:
        """Tokens that are no padding and yet have no place, over all of ``obs`` [N, tokens, 3]; int64 scalar."""
        place, _ = self._place(obs)
        return ((place >= self._size) & (obs[..., 0] != PADDING)).sum()


def last_write(index: Tensor, size: int) -> Tensor:
    """For every position p of ``index`` [M] the last position that writes to ``index[p]``; [M] int64.

    Makes a scatter deterministic where the order of writes is not (on a GPU): all writers of a cell write the same value.
    """
    position = torch.arange(index.numel(), device=index.device)
    winner = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    winner.scatter_reduce_(0, index, position, reduce="amax")
    return winner[index]
