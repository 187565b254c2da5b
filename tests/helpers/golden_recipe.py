"""The golden set's weights and names: numbers made by running the original policies, reproducible by formula."""

from __future__ import annotations

import numpy as np
import torch

NORMALIZATIONS = [1, 10, 30, 1, 1, 255, 1, 1, 255, 10, 10, 100, 255, 255, 1000] + [100] * 10
NUM_ARGS = {"attack": 9, "get_items": 1, "move": 2, "noop": 4, "put_items": 1, "rotate": 1, "swap": 1}
ACTION_NAMES = [f"{name}_{i}" for name, count in NUM_ARGS.items() for i in range(count)]

# (key in our state_dict, role in the golden files, shape, scale), in the order of the recipe's generators.
ROLES = [
    ("cnn1.weight", "conv1.weight", (64, 25, 5, 5), 0.2),
    ("cnn1.bias", "conv1.bias", (64,), 0.1),
    ("cnn2.weight", "conv2.weight", (64, 64, 3, 3), 0.0625),
    ("cnn2.bias", "conv2.bias", (64,), 0.1),
    ("fc1.weight", "fc1.weight", (128, 64), 0.2),
    ("fc1.bias", "fc1.bias", (128,), 0.1),
    ("encoded_obs.weight", "fc2.weight", (128, 128), 0.15),
    ("encoded_obs.bias", "fc2.bias", (128,), 0.1),
    ("lstm.weight_ih_l0", "lstm.weight_ih_l0", (512, 128), 0.2),
    ("lstm.weight_hh_l0", "lstm.weight_hh_l0", (512, 128), 0.1),
    ("lstm.bias_ih_l0", "lstm.bias_ih_l0", (512,), 0.1),
    ("lstm.bias_hh_l0", "lstm.bias_hh_l0", (512,), 0.1),
    ("lstm.weight_ih_l1", "lstm.weight_ih_l1", (512, 128), 0.2),
    ("lstm.weight_hh_l1", "lstm.weight_hh_l1", (512, 128), 0.1),
    ("lstm.bias_ih_l1", "lstm.bias_ih_l1", (512,), 0.1),
    ("lstm.bias_hh_l1", "lstm.bias_hh_l1", (512,), 0.1),
    ("critic_1.weight", "critic.weight", (1024, 128), 0.15),
    ("critic_1.bias", "critic.bias", (1024,), 0.1),
    ("value_head.weight", "value.weight", (1, 1024), 0.0625),
    ("value_head.bias", "value.bias", (1,), 0.1),
    ("actor_1.weight", "actor.weight", (512, 128), 0.15),
    ("actor_1.bias", "actor.bias", (512,), 0.1),
    ("action_embeddings.weight", "embed.weight", (100, 16), 0.5),
    ("actor_W", "bilinear.weight", (1, 512, 16), 0.0625),
    ("actor_bias", "bilinear.bias", (1,), 0.1),
]


def golden_state_dict() -> dict[str, torch.Tensor]:
    """The recipe's weights under our names."""
    return {
        key: torch.from_numpy((np.random.default_rng(1000 + i).standard_normal(shape) * scale).astype(np.float32))
        for i, (key, _, shape, scale) in enumerate(ROLES)
    }
