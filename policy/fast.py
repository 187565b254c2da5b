"""FastPolicy: the whole network in plain PyTorch.

Encoder (token CNN, image CNNs or nothing) -> fc1 -> encoded_obs -> core -> critic and bilinear actor head. With
25 feature planes, an 11x11 window and the LSTM it has 574,978 parameters, whatever the number of actions.
"""

# N rows, A actions, H hidden

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from shoal.policy.actions import Actions, Continuous
from shoal.policy.config import ORIGINAL, Initialization
from shoal.policy.convolution import ResidualSection, convolution_geometry, convolve
from shoal.policy.graph import LSTM, SECTIONS, cnn_kernels, core_component
from shoal.policy.initialization import Streams, component_streams, initialize_layer, initialize_weight
from shoal.policy.observation import (
    RESIDUAL,
    DictObservation,
    ImageObservation,
    Observation,
    TokenObservation,
    VectorObservation,
)
from shoal.policy.precision import linear, tanh
from shoal.policy.recurrent_policy import HIDDEN, PolicyOutput, RecurrentPolicy
from shoal.policy.token_convolution import TokenConvolution
from shoal.policy.tokens import TokensToBox
from torch import Tensor, nn

CHANNELS = 64
EMBEDDING_SIZE = 16


class FastPolicy(RecurrentPolicy):
    """The default recurrent actor-critic, written out in plain PyTorch.

    Args:
        observation: shape and meaning of one observation; a ``TokenObservation`` gives the original network.
        action_names: names of one discrete choice, or an ``Actions`` description of any other action space.
        embedding_rows: size of the action embedding table.
        core: the memory, as ``policy.core`` names it.
        core_kwargs: further arguments of the core.
        action_rows: embedding row by action name, as saved with weights; fresh policies use rows 0..A-1 in name order.
        initialization: how the weights are initialised. Equal seeds of torch's global generator give equal weights.
        trained_observation: the observation that the weights were trained with, if it differs from ``observation``.
        normalize_observations: the network sees vectors in units of their own spread (``policy.normalization``).
        normalize_values: the value head's output is in units of the spread of its targets.

    Raises:
        ValueError: more actions than embedding rows, repeated names, or names without a row in ``action_rows``.
    """

    kind = "fast"

    def __init__(
        self,
        observation: Observation,
        action_names: Sequence[str] | Actions,
        embedding_rows: int = 100,
        *,
        core: str = LSTM,
        core_kwargs: Mapping[str, Any] | None = None,
        action_rows: Mapping[str, int] | None = None,
        initialization: Initialization | None = None,
        trained_observation: Observation | None = None,
        normalize_observations: bool = False,
        normalize_values: bool = False,
    ) -> None:
        super().__init__(
            observation,
            action_names,
            embedding_rows,
            core=core,
            core_kwargs=core_kwargs,
            action_rows=action_rows,
            trained_observation=trained_observation,
            normalize_observations=normalize_observations,
            normalize_values=normalize_values,
        )
        settings = initialization or ORIGINAL
        with component_streams() as streams:
            encoded = self._make_encoder(self.trained_observation)
            self.fc1 = nn.Linear(encoded, HIDDEN)
            self.encoded_obs = nn.Linear(HIDDEN, HIDDEN)
            self.make_core(HIDDEN, streams(core_component(core)))
            self.critic_1 = nn.Linear(HIDDEN, 1024)
            self.value_head = nn.Linear(1024, 1)
            self.actor_1 = nn.Linear(HIDDEN, 512)
            self.action_embeddings = nn.Embedding(embedding_rows, EMBEDDING_SIZE)
            self.actor_W = nn.Parameter(torch.empty(1, 512, EMBEDDING_SIZE))
            self.actor_bias = nn.Parameter(torch.empty(1))
            if isinstance(self.actions, Continuous):
                self.actor_log_std = nn.Parameter(torch.full((self.num_known_actions,), settings.log_std))
            self._initialize(settings, streams)

    def _make_encoder(self, trained: Observation) -> int:
        """Create every layer before fc1 and return the number of features that they output."""
        if isinstance(trained, VectorObservation):
            return trained.size
        if isinstance(trained, DictObservation):
            return trained.numbers.size + sum(
                self._make_image_encoder(image, f"image{index}_") for index, (_, image) in enumerate(trained.images)
            )
        if isinstance(trained, ImageObservation):
            return self._make_image_encoder(trained, "")
        assert isinstance(self.observation, TokenObservation)
        self.to_box = TokensToBox(trained, self.observation)
        self.cnn1: nn.Conv2d
        self.cnn2: nn.Conv2d
        features = self._make_convolutions(trained, self.to_box.num_planes, "", whole=True)
        self._from_tokens = TokenConvolution(self.to_box, self.cnn1, self._middle)
        return features

    def _make_image_encoder(self, image: ImageObservation, prefix: str) -> int:
        """Create what reads an image, its names behind ``prefix``; the number of features that it outputs."""
        if image.encoder != RESIDUAL:
            return self._make_convolutions(image, image.channels, prefix, whole=False)
        planes, sides = image.channels, (image.height, image.width)
        for name, channels in SECTIONS.items():
            self.add_module(f"{prefix}{name}", ResidualSection(planes, channels))
            planes, sides = channels, ResidualSection.sides(*sides)
        return planes * math.prod(sides)

    def _make_convolutions(
        self, trained: TokenObservation | ImageObservation, planes: int, prefix: str, *, whole: bool
    ) -> int:
        """Create ``cnn1`` and ``cnn2``, their names behind ``prefix``; the number of features that they output."""
        (size1, stride1), (size2, stride2) = cnn_kernels(trained)
        kernel1, self._pad, self._middle = convolution_geometry(
            trained.height, trained.width, size1, stride1, whole=whole
        )
        kernel2, _, out = convolution_geometry(*self._middle, size2, stride2, whole=whole)
        self.add_module(f"{prefix}cnn1", nn.Conv2d(planes, CHANNELS, kernel1, stride=stride1))
        self.add_module(f"{prefix}cnn2", nn.Conv2d(CHANNELS, CHANNELS, kernel2, stride=stride2))
        return CHANNELS * math.prod(out)

    def _encode_image(self, image: ImageObservation, box: Tensor, prefix: str = "") -> Tensor:
        """[N, channels, height, width] -> [N, features]"""
        if image.encoder == RESIDUAL:
            for name in SECTIONS:
                box = getattr(self, f"{prefix}{name}")(box)
            return F.relu(box).flatten(1)
        return self._convolve(box, prefix)

    def _convolve(self, box: Tensor, prefix: str = "") -> Tensor:
        """[N, planes, height, width] -> [N, features]"""
        first, second = getattr(self, f"{prefix}cnn1"), getattr(self, f"{prefix}cnn2")
        return F.relu(convolve(second, F.relu(convolve(first, box)))).flatten(1)

    def _convolve_tokens(self, obs: Tensor) -> Tensor:
        """uint8 [N, tokens, 3] -> the output of ``cnn1``, without its activation."""
        if self._from_tokens.applies(obs, self.cnn1):
            return self._from_tokens(obs, self.cnn1)
        box = self.to_box(obs)
        return convolve(self.cnn1, F.pad(box, self._pad) if any(self._pad) else box)

    def _initialize(self, settings: Initialization, streams: Streams) -> None:
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                initialize_layer(layer, streams(name), gain=math.sqrt(2) if name == "critic_1" else 1.0)
            elif isinstance(layer, ResidualSection):
                layer.initialize(streams(name))
        self.core.initialize(streams(core_component(self.core_name)), settings)
        initialize_weight(
            self.action_embeddings.weight,
            streams("action_embeddings"),
            scheme="orthogonal_max",
            gain=settings.action_embeddings,
        )
        actor = streams("actor")
        for parameter in (self.actor_W, self.actor_bias):
            initialize_weight(parameter, actor, scheme="uniform", inputs=512)

    def encode(self, obs: Tensor) -> Tensor:
        """[N, *observation.shape] -> [N, H]."""
        trained = self.trained_observation
        if isinstance(trained, VectorObservation):
            x = self.network_input(obs)
        elif isinstance(trained, DictObservation):
            parts = [
                self._encode_image(image, box, f"image{index}_")
                for index, ((_, image), box) in enumerate(zip(trained.images, self.images(obs), strict=True))
            ]
            x = torch.cat([self.network_input(obs), *parts] if trained.numbers.size else parts, 1)
        elif isinstance(trained, TokenObservation):
            x = F.relu(convolve(self.cnn2, F.relu(self._convolve_tokens(obs)))).flatten(1)
        else:
            [box] = self.images(obs)
            x = self._encode_image(trained, box)
        return F.relu(self.encoded_obs(F.relu(self.fc1(x))))

    def heads(self, core: Tensor) -> PolicyOutput:
        """[N, H] -> logits [N, A], value [N]."""
        value = linear(tanh(self.critic_1(core)), self.value_head.weight, self.value_head.bias).squeeze(-1)
        return PolicyOutput(self.logits(core), self.in_reward_units(value))

    def logits(self, core: Tensor) -> Tensor:
        """[N, H] -> logits [N, A], without the value, which acting does not need."""
        query = tanh(F.relu(self.actor_1(core)) @ self.actor_W[0])
        logits = self.in_order(linear(query, self.action_embeddings.weight[self._rows], None) + self.actor_bias)
        if isinstance(self.actions, Continuous):
            logits = torch.cat([logits, self.in_order(self.actor_log_std).expand_as(logits)], -1)
        return logits
