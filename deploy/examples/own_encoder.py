"""An encoder of one's own for images: a residual CNN as IMPALA has it, before shoal's memory and heads of one layer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import shoal
import torch
import yaml
from gymnasium import spaces
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions beside the identity: [N, C, height, width] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions make of ``x`` to it."""
        return x + self.second(torch.relu(self.first(torch.relu(x))))


class ResidualCNN(nn.Module):
    """[N, C, height, width] -> [N, size]; each of ``channels`` is a stage that halves the sides.

    Without batch normalization, with which a row would depend on the others.
    """

    def __init__(self, image: shoal.ImageObservation, channels: Sequence[int], size: int) -> None:
        super().__init__()
        height, width, before = image.shape
        stages: list[nn.Module] = []
        for after in channels:
            stages += [nn.Conv2d(before, after, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            stages += [Residual(after), Residual(after)]
            height, width, before = (height + 1) // 2, (width + 1) // 2, after
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(before * height * width, size)

    def forward(self, x: Tensor) -> Tensor:
        """The features of every image."""
        return torch.relu(self.out(torch.relu(self.stages(x)).flatten(1)))


class Seeing(shoal.RecurrentPolicy):
    """A residual CNN for each image, the numbers of a Dict beside them; for one discrete choice."""

    def __init__(
        self,
        observation: Any,
        actions: Any,
        embedding_rows: int,
        *,
        action_rows: Mapping[str, int] | None = None,
        trained_observation: Any = None,
        initialization: Any = None,  # shoal's own policies read it
        core: str = "lstm",
        core_kwargs: Mapping[str, Any] | None = None,
        channels: Sequence[int] = (16, 32, 32),
        size: int = 128,
    ) -> None:
        super().__init__(
            observation,
            actions,
            embedding_rows,
            action_rows=action_rows,
            trained_observation=trained_observation,
            hidden=size,
            core=core,
            core_kwargs=core_kwargs,
        )
        match self.trained_observation:
            case shoal.ImageObservation() as image:
                images, numbers = [image], 0
            case shoal.DictObservation() as mixed:
                images, numbers = [image for _, image in mixed.images], mixed.numbers.size
            case other:
                raise ValueError(f"Seeing encodes images, got {other}")
        self.eyes = nn.ModuleList(ResidualCNN(image, channels, size) for image in images)
        self.make_core(size * len(images) + numbers)
        self.actor = nn.Linear(size, self.num_known_actions)
        self.value_head = nn.Linear(size, 1)

    def encode(self, obs: Tensor) -> Tensor:
        """[N, *observation.shape] -> [N, features of all images, and numbers]."""
        seen = [eye(image) for eye, image in zip(self.eyes, self.images(obs), strict=True)]
        if isinstance(self.trained_observation, shoal.DictObservation):
            seen.append(self.network_input(obs))
        return torch.cat(seen, 1)

    def heads(self, core: Tensor) -> shoal.PolicyOutput:
        """[N, size] -> logits [N, actions], value [N]."""
        return shoal.PolicyOutput(self.logits(core), self.in_reward_units(self.value_head(core).squeeze(-1)))

    def logits(self, core: Tensor) -> Tensor:
        """[N, size] -> logits [N, actions]: the part of ``heads`` that acting needs."""
        return self.in_order(self.actor(core))


class Catch(gymnasium.Env[Any, np.int64]):
    """A ball falls through an image of 16 x 16 pixels; catching it at the bottom with a paddle gives 1."""

    def __init__(self, wind: bool = False) -> None:
        """With ``wind``, which moves the ball, observations are a Dict of the camera's image and the wind."""
        camera = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self.observation_space = (
            spaces.Dict(camera=camera, wind=spaces.Box(-1, 1, (1,), np.float32)) if wind else camera
        )
        self.action_space = spaces.Discrete(3)
        self.windy, self.wind, self.ball, self.paddle, self.row = wind, 0, 0, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Drop a ball."""
        super().reset(seed=seed)
        self.ball, self.paddle = (int(place) for place in self.np_random.integers(2, 14, 2))
        self.wind, self.row = int(self.np_random.integers(-1, 2)) if self.windy else 0, 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move the paddle left, not at all or right, and the ball down by a row."""
        self.paddle = int(np.clip(self.paddle + action - 1, 1, 14))
        self.ball, self.row = int(np.clip(self.ball + self.wind * (self.row % 4 == 0), 0, 15)), self.row + 1
        landed = self.row == 15
        return self._observe(), float(landed and abs(self.ball - self.paddle) <= 1), landed, False, {}

    def _observe(self) -> Any:
        image = np.zeros((16, 16, 3), np.uint8)
        image[15, self.paddle - 1 : self.paddle + 2, 2] = 255
        image[self.row, self.ball] = 255
        return {"camera": image, "wind": np.array([self.wind], np.float32)} if self.windy else image


def main(**settings: Any) -> shoal.Run:
    """Train it to catch the ball."""
    run = shoal.train(
        Catch,
        policy=Seeing,
        config={
            "policy.kwargs": {"channels": [8, 16]},
            "total_env_steps": 100_000,
            "actor.unroll_length": 16,
        },
        **settings,
    )
    parameters = sum(parameter.numel() for parameter in run.policy.network.parameters())
    print(f"{type(run.policy.network).__name__} with {parameters:,} parameters: {run.summary['mean_return']}")
    return run


if __name__ == "__main__":
    words = [word.partition("=") for word in sys.argv[1:]]
    main(**{key: yaml.safe_load(value) for key, _, value in words})
