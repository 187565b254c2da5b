"""The multiply-adds that ``shoal bench limit`` counts."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shoal.policy import FastPolicy, TokenObservation, VectorObservation
from shoal.policy.observation import ImageObservation, Observation

sys.path.append(str(Path(__file__).resolve().parent / "bench"))
from _roofline import layers, products, token_multiply_adds

NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    "observation",
    [
        VectorObservation(5),
        ImageObservation(40, 48, 3),
        TokenObservation(11, 11, 40, [1.0] * 7),
    ],
    ids=["vector", "image", "tokens"],
)
@pytest.mark.parametrize("epochs", [1, 4])
def test_every_weight_is_counted_as_often_as_it_is_used(observation: Observation, epochs: int) -> None:
    """Catches a layer that is left out, a pass that is forgotten, and the critic counted while acting."""
    policy = FastPolicy(observation, NAMES, embedding_rows=3)
    matrices = {name: p.numel() for name, p in policy.named_parameters() if p.ndim > 1}
    if not isinstance(observation, VectorObservation):
        for name, positions in (
            ("cnn1", policy._middle[0] * policy._middle[1]),
            ("cnn2", policy.fc1.in_features // 64),
        ):
            matrices[f"{name}.weight"] *= positions
    first = "fc1.weight" if isinstance(observation, VectorObservation) else "cnn1.weight"
    if isinstance(observation, TokenObservation):
        matrices.pop(first)
        first = ""
    acting = sum(n for name, n in matrices.items() if not name.startswith(("critic", "value")))
    update = 3 * sum(matrices.values()) - matrices.get(first, 0)
    found = products(policy, 16, 8, 32, epochs, bfloat16=False)
    assert sum(product.multiply_adds for product in found) == pytest.approx(acting + epochs * update)


def test_tokens_are_counted_where_they_lie() -> None:
    """Catches padding and tokens that are overwritten counted, and every token in the mean number of patches."""
    observation = TokenObservation(11, 11, 4, [3.0, 5.0])
    policy = FastPolicy(observation, NAMES)
    obs = np.full((2, 4, 3), 0xFF, np.uint8)
    obs[0, :3] = [(0x00, 0, 9), (0x55, 1, 0), (0x55, 1, 7)]  # the corner, and twice the middle
    obs[1, 0] = (0x33, 0, 1)
    (height, width), (down, right) = policy.cnn1.kernel_size, policy.cnn1.stride
    patches = {
        cell: sum(
            0 <= cell[0] - y * down < height and 0 <= cell[1] - x * right < width
            for y, x in itertools.product(range(policy._middle[0]), range(policy._middle[1]))
        )
        for cell in ((0, 0), (5, 5), (3, 3))
    }
    expected = sum(patches.values()) / 2 * 64 * (1 + 2 * 3)
    assert token_multiply_adds(policy, torch.from_numpy(obs), 3) == pytest.approx(expected)
    assert len(layers(policy)) == len(layers(FastPolicy(VectorObservation(1), NAMES))) + 1
