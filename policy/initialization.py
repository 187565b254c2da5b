"""Weight initialisation: each component draws from its own random stream, so none depends on those created before."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Streams = Callable[[str], torch.Generator]


@contextlib.contextmanager
def component_streams() -> Iterator[Streams]:
    """Yield a function from component name to random stream, seeded by one draw of torch's global generator.

    The block's own draws from the global generator are undone: torch initialises every layer that it constructs.
    """
    base = int(torch.randint(2**63 - 1, (), device="cpu"))

    def stream(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{base}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    with torch.random.fork_rng(devices=[]):
        yield stream


@torch.no_grad()
def initialize_weight(
    weight: Tensor, stream: torch.Generator, *, scheme: str = "orthogonal", gain: float = 1.0, inputs: int = 1
) -> None:
    """Fill ``weight`` (two or more dimensions) by a scheme of ``policy.graph.ComponentConfig``.

    ``uniform`` draws from [-b, b] with b = gain / sqrt(inputs).

    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme == "orthogonal":
        nn.init.orthogonal_(weight, gain, generator=stream)
    elif scheme == "orthogonal_max":
        nn.init.orthogonal_(weight, generator=stream)
        weight.mul_(gain / weight.abs().max())
    elif scheme == "uniform":
        bound = gain / math.sqrt(inputs)
        nn.init.uniform_(weight, -bound, bound, generator=stream)
    elif scheme == "zeros":
        nn.init.zeros_(weight)
    else:
        raise ValueError(f"unknown initialization {scheme!r}")


@torch.no_grad()
def initialize_layer(
    layer: nn.Linear | nn.Conv2d, stream: torch.Generator, *, scheme: str = "orthogonal", gain: float = 1.0
) -> None:
    """Initialise the weight with ``initialize_weight`` and the bias with zeros."""
    initialize_weight(layer.weight, stream, scheme=scheme, gain=gain, inputs=layer.weight[0].numel())
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def initialize_lstm(
    lstm: nn.LSTM, stream: torch.Generator, *, bias: str, scheme: str = "orthogonal", gain: float = 1.0
) -> None:
    """Initialise the weights with ``initialize_weight``; ``bias`` is ``policy.config.Initialization.lstm_bias``."""
    hidden = lstm.hidden_size
    for name, parameter in lstm.named_parameters():
        if "weight" in name:
            initialize_weight(parameter, stream, scheme=scheme, gain=gain, inputs=hidden)
        elif bias == "ones":
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
            if bias == "forget" and name.startswith("bias_ih"):
                parameter[hidden : 2 * hidden] = 1.0  # torch's gate order: input, forget, cell, output
