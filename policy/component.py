"""ComponentPolicy: ``FastPolicy``'s network put together from named components, which settings change by name.

The default graph has the same parameters in the same order and gives the same numbers, bit for bit on a CPU.
"""

# N rows, A actions, E embedding size, H hidden

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from shoal.policy.actions import Actions, Continuous
from shoal.policy.config import ORIGINAL, Initialization
from shoal.policy.core import Core
from shoal.policy.graph import (
    ACTOR,
    EMBEDDINGS,
    LSTM,
    OBS,
    VALUE,
    Component,
    actor_of,
    components_from_json,
    core_component,
    encoder_of,
    heads_of,
    image_source,
    resolve,
)
from shoal.policy.initialization import Streams, component_streams, initialize_layer, initialize_weight
from shoal.policy.layers import ActionEmbeddings, Convolution, Dense, ImageShaper, Normalizer, Residual, TokenShaper
from shoal.policy.lstm import LSTMCore
from shoal.policy.observation import DictObservation, Observation, TokenObservation
from shoal.policy.precision import linear, tanh
from shoal.policy.recurrent_policy import PolicyOutput, RecurrentPolicy
from shoal.policy.token_convolution import TokenConvolution
from shoal.policy.tokens import TokensToBox
from torch import Tensor, nn


class ComponentPolicy(RecurrentPolicy):
    """A recurrent actor-critic assembled from named components (``policy.graph``).

    Each component is a submodule under its name; the actor's parameters are ``actor_W`` and ``actor_bias``.

    Args:
        observation: shape and meaning of one observation.
        action_names: names of one discrete choice, or an ``Actions`` description of any other action space.
        embedding_rows: size of the action embedding table.
        components: differences from the default graph by component, as ``policy.components`` in the configuration.
        core: the memory, as ``policy.core`` names it.
        core_kwargs: further arguments of the core.
        action_rows: embedding row by action name, as saved with weights; fresh policies use rows 0..A-1 in name order.
        initialization: how the weights are initialised. Equal seeds of torch's global generator give equal weights,
            and the weights of each component depend on its own settings alone.
        trained_observation: the observation that the weights were trained with, if it differs from ``observation``.
        normalize_observations: the network sees vectors in units of their own spread (``policy.normalization``).
        normalize_values: the value head's output is in units of the spread of its targets.

    Raises:
        ValueError: as ``FastPolicy``, or the components do not form a network; the message lists every problem.
    """

    kind = "component"

    def __init__(
        self,
        observation: Observation,
        action_names: Sequence[str] | Actions,
        embedding_rows: int = 100,
        *,
        components: Mapping[str, Mapping[str, Any] | None] | None = None,
        core: str = LSTM,
        core_kwargs: Mapping[str, Any] | None = None,
        action_rows: Mapping[str, int] | None = None,
        initialization: Initialization | None = None,
        trained_observation: Observation | None = None,
        normalize_observations: bool = False,
        normalize_values: bool = False,
    ) -> None:
        self._components = {
            name: None if settings is None else dict(settings) for name, settings in (components or {}).items()
        }
        self.graph = resolve(components_from_json(self._components), trained_observation or observation, core)
        self._memory = core_component(core)
        """The name of the component that is the core."""
        super().__init__(
            observation,
            action_names,
            embedding_rows,
            action_rows=action_rows,
            trained_observation=trained_observation,
            hidden=self.graph[self._memory].size,
            core=core,
            core_kwargs=core_kwargs,
            normalize_observations=normalize_observations,
            normalize_values=normalize_values,
        )
        if taken := [name for name in self.graph if hasattr(self, name)]:
            raise ValueError("\n".join(f"components.{name}: the name is taken; choose another" for name in taken))
        self._encoder, self._heads, self._actor = encoder_of(self.graph), heads_of(self.graph), actor_of(self.graph)
        with component_streams() as streams:
            self._make(initialization or ORIGINAL, streams, embedding_rows)
        self._from_tokens = self._token_convolutions()
        """Convolutions that read nothing but a box of tokens, by name."""
        self._without_boxes = self._encoder_without_boxes()
        """The encoder's components that are left where these read the tokens themselves."""
        states = [f"{when}_{name}" for when in ("initial", "next") for name in self.core.state_shapes]
        if taken := [name for name in states if name in self.graph]:
            raise ValueError("\n".join(f"components.{name}: the name is taken; choose another" for name in taken))

    @property
    def components(self) -> dict[str, dict[str, Any] | None]:
        """The differences from the default graph, as they were given."""
        return self._components

    @property
    def to_box(self) -> TokensToBox | None:
        """The component that places tokens into a box; None if the graph has none."""
        return next((module for module in self.children() if isinstance(module, TokensToBox)), None)

    def _make(self, settings: Initialization, streams: Streams, embedding_rows: int) -> None:
        """Register and initialise the components, in the graph's order, deriving shapes from the observation."""
        trained = self.trained_observation
        shapes: dict[str, tuple[int, ...]] = {OBS: trained.shape}
        if isinstance(trained, DictObservation):
            shapes = {OBS: trained.numbers.shape}
            for name, image in trained.images:
                shapes[image_source(name)] = (image.channels, image.height, image.width)
        made: dict[str, nn.Module | None] = {}
        for name in (*self._encoder, self._memory, *self._heads):
            component = self.graph[name]
            inputs = [shapes[source] for source in component.sources]
            if name == self._memory:
                made[name], shapes[name] = self._new_core(math.prod(inputs[0]), streams(name)), (component.size,)
            else:
                made[name], shapes[name] = self._make_component(component, inputs, embedding_rows)
        for name, component in self.graph.items():
            module, stream = made[name], streams(name)
            if name == ACTOR:
                features, embedding = (shapes[source][0] for source in component.sources)
                self._make_actor(component, features, embedding, stream, settings.log_std)
                continue
            assert module is not None
            self.add_module(name, module)
            scheme, gain = component.initialization, component.gain
            if isinstance(module, LSTMCore):
                module.initialize(stream, settings, scheme=scheme, gain=gain)
            elif isinstance(module, Core):
                module.initialize(stream, settings)
            elif isinstance(module, Residual):
                module.initialize(stream, scheme=scheme, gain=gain)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                initialize_layer(module, stream, scheme=scheme, gain=gain)
            elif isinstance(module, nn.Embedding):
                if (self._components.get(name) or {}).get("gain") is None:
                    gain = settings.action_embeddings
                initialize_weight(module.weight, stream, scheme=scheme, gain=gain, inputs=component.size)

    def _make_component(
        self, component: Component, inputs: Sequence[tuple[int, ...]], embedding_rows: int
    ) -> tuple[nn.Module | None, tuple[int, ...]]:
        """The uninitialised module and the shape of its output for one row."""
        size = component.size
        match component.kind:
            case "tokens_to_box":
                trained = self.trained_observation
                assert isinstance(trained, TokenObservation)
                assert isinstance(self.observation, TokenObservation)
                shaper = TokenShaper(trained, self.observation)
                return shaper, (shaper.num_planes, shaper.height, shaper.width)
            case "image_to_box":
                height, width, channels = inputs[0]
                return ImageShaper(), (channels, height, width)
            case "normalize":
                described: Observation = self.trained_observation
                if isinstance(described, DictObservation):
                    images = {image_source(name): image for name, image in described.images}
                    described = images[component.sources[0]]
                return Normalizer(described), inputs[0]
            case "conv":
                whole = isinstance(self.trained_observation, TokenObservation)
                planes, height, width = inputs[0]
                convolution = Convolution((planes, height, width), component, whole=whole)
                return convolution, convolution.shape
            case "residual":
                planes, height, width = inputs[0]
                section = Residual((planes, height, width), component)
                return section, section.shape
            case "linear":
                return Dense(sum(map(math.prod, inputs)), component), (size,)
            case "embedding":
                return ActionEmbeddings(embedding_rows, size, self._rows), (size,)
            case _:
                return None, (len(self._rows),)

    def _make_actor(
        self, component: Component, features: int, embedding: int, stream: torch.Generator, log_std: float
    ) -> None:
        """``actor_W`` and ``actor_bias``: parameters of the policy itself, the names that checkpoints use."""
        self.actor_W = nn.Parameter(torch.empty(1, features, embedding))
        self.actor_bias = nn.Parameter(torch.zeros(1))
        scheme, gain = component.initialization, component.gain
        initialize_weight(self.actor_W[0], stream, scheme=scheme, gain=gain, inputs=features)
        if scheme == "uniform":
            initialize_weight(self.actor_bias, stream, scheme=scheme, gain=gain, inputs=features)
        if isinstance(self.actions, Continuous):
            self.actor_log_std = nn.Parameter(torch.full((self.num_known_actions,), log_std))

    def _token_convolutions(self) -> dict[str, TokenConvolution]:
        found = {}
        for name in self._encoder:
            layer, source = getattr(self, name), self.graph[name].sources[0]
            scale = None
            if isinstance(layer, Convolution):
                if isinstance(normalizer := getattr(self, source, None), Normalizer):
                    scale, source = normalizer.scale.flatten(), self.graph[source].sources[0]
                if isinstance(box := getattr(self, source, None), TokensToBox):
                    found[name] = TokenConvolution(box, layer, layer.shape[1:], scale)
        return found

    def _encoder_without_boxes(self) -> list[str]:
        needed = set(self.graph[self._memory].sources)
        for name in reversed(self._encoder):
            if name in needed and name not in self._from_tokens:
                needed.update(self.graph[name].sources)
        return [name for name in self._encoder if name in needed]

    def encode(self, obs: Tensor) -> Tensor:
        """[N, *observation.shape] -> the core's input [N, ...]; runs only what that needs."""
        return self._encode(obs, self._without_boxes if self._reads_tokens(obs) else self._encoder)[0]

    def _reads_tokens(self, obs: Tensor) -> bool:
        return any(convolution.applies(obs, getattr(self, name)) for name, convolution in self._from_tokens.items())

    def heads(self, core: Tensor) -> PolicyOutput:
        """[N, H] -> logits [N, A], value [N]; runs only the components that they depend on."""
        outputs = self._run(self._heads, {self._memory: core})
        return PolicyOutput(outputs[ACTOR], self.in_reward_units(outputs[VALUE].squeeze(-1)))

    def logits(self, core: Tensor) -> Tensor:
        """[N, H] -> logits [N, A]; runs only the components that they depend on."""
        return self._run(self._actor, {self._memory: core})[ACTOR]

    def encode_outputs(self, obs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``encode``, and the output of every component before the core, each [N, ...]."""
        return self._encode(obs, self._encoder)

    def _encode(self, obs: Tensor, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {OBS: self.network_input(obs)}
        if isinstance(self.observation, DictObservation):
            for index, (name, _) in enumerate(self.observation.images):
                inputs[image_source(name)] = self.image(obs, index)
        outputs = dict(inputs)
        if self._reads_tokens(obs):
            for name, convolution in self._from_tokens.items():
                layer = getattr(self, name)
                outputs[name] = layer.activate(convolution(obs, layer))
        outputs = self._run((name for name in names if name not in outputs), outputs)
        x = outputs[self.graph[self._memory].sources[0]]
        return x, {name: output for name, output in outputs.items() if name not in inputs}

    def head_outputs(self, core: Tensor) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """``heads``, and the output of the core and every component behind it, each [N, ...]."""
        outputs = self._run(self._heads, {self._memory: core})
        table = outputs[EMBEDDINGS]
        outputs[EMBEDDINGS] = table.expand(len(core), *table.shape)
        return PolicyOutput(outputs[ACTOR], self.in_reward_units(outputs[VALUE].squeeze(-1))), outputs

    def _run(self, names: Iterable[str], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in names:
            inputs = [outputs[source] for source in self.graph[name].sources]
            outputs[name] = self._act(*inputs) if name == ACTOR else getattr(self, name)(*inputs)
        return outputs

    def _act(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """[N, F], [A, E] -> logits [N, A]: one query per row, whatever the number of actions."""
        query = tanh(features @ self.actor_W[0])
        logits = self.in_order(linear(query, embeddings, None) + self.actor_bias)
        if isinstance(self.actions, Continuous):
            logits = torch.cat([logits, self.in_order(self.actor_log_std).expand_as(logits)], -1)
        return logits
