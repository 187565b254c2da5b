"""Weights on the wire: parameters and statistics in one flat float32 buffer per version, with its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import nn


class WeightsError(ValueError):
    """The buffer is not the published one: its size or hash differs, or its version is older."""


class Opponent(NamedTuple):
    """A frozen version that plays agents of self-play games."""

    policy_version: int
    probability: float
    """Of being drawn."""
    weights: Any
    """Its ``Weights``, or a reference to them, as a pool passes weights to its workers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """One published version of a policy's weights."""

    policy_version: int
    """Number of updates made so far."""
    flat: np.ndarray
    """float32 [size]: the policy's ``published_tensors``, one after the other."""
    content_hash: str
    """xxh3-128 of the buffer: every actor verifies every version, and sha256 would cost ten times as much."""
    env_options: Mapping[str, Any] | None = None
    """Options for the episodes that begin while actors act with this version; None for none."""
    opponents: tuple[Opponent, ...] = ()
    """The versions that self-play games are played against; references, so that none is sent twice."""

    def verify(self) -> None:
        """Raise WeightsError if the buffer does not match its hash."""
        actual = hash_of(self.flat)
        if actual != self.content_hash:
            raise WeightsError(
                f"weights of version {self.policy_version}: expected content hash {self.content_hash}, got {actual}"
            )

    @property
    def sha256(self) -> str:
        """SHA-256 of the buffer's bytes as hex; identifies the weights in summaries and checkpoints."""
        return hashlib.sha256(np.ascontiguousarray(self.flat).data).hexdigest()


def hash_of(flat: np.ndarray) -> str:
    """Content hash of a buffer."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(flat).data)


def published_tensors(policy: nn.Module) -> dict[str, torch.Tensor]:
    """What a version consists of, by name: the parameters in ``named_parameters`` order, then the persistent buffers,
    which are statistics that the network computes with. They share the policy's memory."""
    tensors: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    return tensors | {name: tensor for name, tensor in policy.state_dict().items() if name not in tensors}


@torch.no_grad()
def flatten_weights(policy: nn.Module, policy_version: int) -> Weights:
    """The policy's ``published_tensors`` as a new buffer."""
    parts = [p.reshape(-1).to("cpu", torch.float32) for p in published_tensors(policy).values()]
    flat = torch.cat(parts).numpy()
    return Weights(policy_version, flat, hash_of(flat))


def named_weights(policy: nn.Module, weights: Weights) -> dict[str, torch.Tensor]:
    """A version's tensors by name, in the policy's shapes, as views of the buffer.

    Raises:
        WeightsError: the number of parameters differs.
    """
    parameters = published_tensors(policy)
    expected = sum(p.numel() for p in parameters.values())
    if weights.flat.size != expected:
        raise WeightsError(
            f"weights of version {weights.policy_version}: expected {expected} parameters, got {weights.flat.size}"
        )
    with warnings.catch_warnings():
        # The buffer may lie in read-only shared memory; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        source = torch.from_numpy(weights.flat)
    parts = source.split([p.numel() for p in parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


@torch.no_grad()
def load_weights(policy: nn.Module, weights: Weights) -> None:
    """Copy a version into the policy.

    Raises:
        WeightsError: the number of parameters differs.
    """
    tensors = published_tensors(policy)
    for name, part in named_weights(policy, weights).items():
        tensors[name].copy_(part)
