"""The products that an environment step costs, and how fast this machine multiplies matrices of their very shapes.

An environment step is acted on once, and each pass of an update computes it forward and backward. Counted are the
multiply-adds of all layers, the first one from tokens by the tokens that there are, all else densely. The roofline is
the number of environment steps whose products, and nothing else, the cores could compute in a second.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from shoal.policy.fast import FastPolicy
from shoal.policy.observation import DictObservation, TokenObservation
from shoal.policy.token_convolution import TokenConvolution
from torch import Tensor, nn


class Product(NamedTuple):
    """[rows, inner] x [inner, columns], so many times for each environment step."""

    rows: int
    inner: int
    columns: int
    per_step: float
    bfloat16: bool = False

    @property
    def multiply_adds(self) -> float:
        """Of an environment step."""
        return self.rows * self.inner * self.columns * self.per_step


class Layer(NamedTuple):
    """A matrix that every row of an observation meets ``positions`` times."""

    inputs: int
    outputs: int
    positions: int = 1
    recurrent: bool = False
    """It meets one step of the segments at a time."""
    acts: bool = True
    first: bool = False
    """Nothing before it has a gradient."""


def layers(policy: FastPolicy) -> list[Layer]:
    """Every layer of Fast but the first one from tokens, which is counted by tokens.

    Raises:
        ValueError: the observation is a Dict with images.
    """
    found = []
    if isinstance(policy.trained_observation, DictObservation) and policy.trained_observation.images:
        raise ValueError("the roofline of Dicts with images is not counted; choose another env.id")
    if isinstance(policy.trained_observation, TokenObservation):
        found.append(_convolution(policy.cnn2, policy.fc1.in_features // policy.cnn2.out_channels))
    elif hasattr(policy, "cnn1"):
        first = _convolution(policy.cnn1, math.prod(policy._middle))
        found.append(first._replace(first=True))
        found.append(_convolution(policy.cnn2, policy.fc1.in_features // policy.cnn2.out_channels))
    for linear in (policy.fc1, policy.encoded_obs):
        found.append(Layer(linear.in_features, linear.out_features, first=not found))
    for layer in range(policy.lstm.num_layers):
        inputs = policy.lstm.input_size if layer == 0 else policy.lstm.hidden_size
        found.append(Layer(inputs, 4 * policy.lstm.hidden_size))
        found.append(Layer(policy.lstm.hidden_size, 4 * policy.lstm.hidden_size, recurrent=True))
    critic = (policy.critic_1, policy.value_head)
    found += [Layer(linear.in_features, linear.out_features, acts=False) for linear in critic]
    found.append(Layer(policy.actor_1.in_features, policy.actor_1.out_features))
    found.append(Layer(*policy.actor_W.shape[1:]))
    found.append(Layer(policy.action_embeddings.embedding_dim, policy.num_known_actions))
    return found


def _convolution(layer: nn.Conv2d, positions: int) -> Layer:
    return Layer(math.prod(layer.weight.shape[1:]), layer.out_channels, positions)


def products(
    policy: FastPolicy, slots: int, segments: int, unroll_length: int, epochs: int, *, bfloat16: bool
) -> list[Product]:
    """All products of acting on ``slots`` slots, and of updates with ``segments`` segments in a minibatch."""
    found = []
    for layer in layers(policy):
        positions, inner, columns = layer.positions, layer.inputs, layer.outputs
        if layer.acts:
            found.append(Product(slots * positions, inner, columns, 1 / slots))
        rows = segments * positions * (1 if layer.recurrent else unroll_length)
        each = epochs * positions / rows
        found.append(Product(rows, inner, columns, each, bfloat16))
        if not layer.first:
            found.append(Product(rows, columns, inner, each, bfloat16))
        # The gradient of the weights is one product over all steps, of a recurrent layer, too.
        every = segments * positions * unroll_length
        found.append(Product(inner, every, columns, epochs * positions / every, bfloat16))
    return found


def token_multiply_adds(policy: FastPolicy, obs: Tensor, epochs: int) -> float:
    """Of the first layer and an environment step: forward while acting, forward and its weights' gradient in updates.

    ``obs`` is uint8 [N, tokens, 3].
    """
    if not isinstance(policy.trained_observation, TokenObservation):
        return 0.0
    counter = nn.Conv2d(policy.to_box.num_planes, 1, policy.cnn1.kernel_size, policy.cnn1.stride)
    counter.weight.data.fill_(1.0)
    assert counter.bias is not None
    counter.bias.data.zero_()
    # Where every token writes 1 and every weight is 1, the output is the number of multiply-adds of a channel.
    convolution = TokenConvolution(policy.to_box, counter, policy._middle)
    convolution._tables[2].fill(1.0)
    with torch.no_grad():
        per_channel = float(convolution(obs, counter).sum()) / len(obs)
    return per_channel * policy.cnn1.out_channels * (1 + 2 * epochs)


def seconds_per_step(found: list[Product], budget: float) -> float:
    """Seconds that the products of an environment step take on this core; about ``budget`` seconds are spent."""
    return sum(product.per_step * _seconds(product, budget / len(found)) for product in found)


def _seconds(product: Product, budget: float) -> float:
    """The fastest of as many calls as fit: what the core reaches."""
    dtype = torch.bfloat16 if product.bfloat16 else torch.float32
    a = torch.randn(product.rows, product.inner).to(dtype)
    b = torch.randn(product.inner, product.columns).to(dtype)
    out = torch.mm(a, b)
    fastest, end = math.inf, time.perf_counter() + budget
    while math.isinf(fastest) or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
