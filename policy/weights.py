"""Weights on the wire: one flat float32 buffer per version, with its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn


class WeightsError(ValueError):
    """The buffer is not the published one: its size or hash differs, or its version is older."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """One published version of a policy's weights."""

    policy_version: int
    """Number of updates made so far."""
    flat: np.ndarray
    """float32 [parameters], the policy's parameters in ``named_parameters`` order."""
    content_hash: str
    """xxh3-128 of the buffer: every actor verifies every version, and sha256 would cost ten times as much."""
    env_options: Mapping[str, Any] | None = None
    """Options for the episodes that begin while actors act with this version; None for none."""

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


@torch.no_grad()
def flatten_weights(policy: nn.Module, policy_version: int) -> Weights:
    """The policy's parameters as a new buffer."""
    flat = torch.cat([p.detach().reshape(-1).to("cpu", torch.float32) for p in policy.parameters()]).numpy()
    return Weights(policy_version, flat, hash_of(flat))


def named_weights(policy: nn.Module, weights: Weights) -> dict[str, torch.Tensor]:
    """A version's parameters by name, in the policy's shapes, as views of the buffer.

    Raises:
        WeightsError: the number of parameters differs.
    """
    parameters = dict(policy.named_parameters())
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
    for parameter, part in zip(policy.parameters(), named_weights(policy, weights).values(), strict=True):
        parameter.copy_(part)
