"""Modules of a ``ComponentPolicy``'s components; their parameters have torch's own names."""

# N rows, C planes, A actions, E embedding size

from __future__ import annotations

import torch
import torch.nn.functional as F
from shoal.policy.convolution import ResidualSection, convolution_geometry, convolve
from shoal.policy.graph import Component
from shoal.policy.observation import ImageObservation, Observation, TokenObservation
from shoal.policy.precision import linear, tanh
from shoal.policy.tokens import TokensToBox
from torch import Tensor, nn


class TokenShaper(TokensToBox):
    """uint8 [N, tokens, 3] -> float32 [N, C, height, width] of the values as they arrive, not normalized."""

    def __init__(self, trained: TokenObservation, presented: TokenObservation) -> None:
        super().__init__(trained, presented)
        values = torch.arange(256, dtype=torch.float32)
        for feature, value, _ in trained.planes_of(presented):
            if value is None:
                self._magnitude.view(256, 256)[feature] = values


class ImageShaper(nn.Module):
    """[N, height, width, C] -> float32 [N, C, height, width], in the numbers of the observation."""

    def forward(self, obs: Tensor) -> Tensor:
        """Move the channels first and convert to float32."""
        return obs.permute(0, 3, 1, 2).float()


class Normalizer(nn.Module):
    """[N, C, height, width] / one number per plane: the features' normalizations, or an image's scale."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        scale = [observation.scale if isinstance(observation, ImageObservation) else 1.0]
        if isinstance(observation, TokenObservation):
            norms = observation.feature_normalizations
            scale = [1.0 if value is not None else norms[feature] or 1.0 for feature, value in observation.planes]
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)

    def forward(self, box: Tensor) -> Tensor:
        """Divide each plane by its scale."""
        return box / self.scale


class Convolution(nn.Conv2d):
    """[N, C, height, width] -> [N, *shape], with its activation."""

    def __init__(self, inputs: tuple[int, int, int], component: Component, *, whole: bool) -> None:
        channels, stride = component.size, component.stride
        kernel, pad, out = convolution_geometry(*inputs[1:], component.kernel, stride, whole=whole)
        super().__init__(inputs[0], channels, kernel, stride=stride)
        self.pad, self.shape, self.activation = pad, (channels, *out), component.activation

    def forward(self, box: Tensor) -> Tensor:
        """Pad, convolve and apply the activation."""
        x = F.pad(box, self.pad) if any(self.pad) else box
        return self.activate(convolve(self, x))

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return _activate(self.activation, x)


class Residual(ResidualSection):
    """[N, C, height, width] -> [N, *shape], with its activation."""

    def __init__(self, inputs: tuple[int, int, int], component: Component) -> None:
        planes, height, width = inputs
        super().__init__(planes, component.size)
        self.shape, self.activation = (component.size, *self.sides(height, width)), component.activation

    def forward(self, box: Tensor) -> Tensor:
        """The section's output with the activation applied."""
        return _activate(self.activation, super().forward(box))


class Dense(nn.Linear):
    """One or more inputs [N, ...], flattened and concatenated -> [N, size], with its activation."""

    def __init__(self, inputs: int, component: Component) -> None:
        super().__init__(inputs, component.size)
        self.activation = component.activation

    def forward(self, *sources: Tensor) -> Tensor:
        """Concatenate the inputs, apply the linear layer and the activation."""
        flat = [source.flatten(1) if source.ndim > 2 else source for source in sources]
        x = flat[0] if len(flat) == 1 else torch.cat(flat, -1)
        return _activate(self.activation, linear(x, self.weight, self.bias))


class ActionEmbeddings(nn.Embedding):
    """The embeddings [A, E] of the actions that the weights know, by row."""

    def __init__(self, table: int, size: int, rows: Tensor) -> None:
        super().__init__(table, size)
        self._rows: Tensor
        self.register_buffer("_rows", rows.clone(), persistent=False)

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return [A, E]; there is no input, since they are the same for every row."""
        return self.weight[self._rows]


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return F.relu(x)
    return tanh(x) if name == "tanh" else x
