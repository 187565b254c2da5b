"""Weights on the wire: one flat float32 buffer per version, with its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings

import numpy as np
import torch
from torch import nn


class WeightsError(ValueError):
    """A buffer that is not what was published: wrong size, wrong hash, an older version."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """One published version."""

    policy_version: int
    """Updates made so far."""
    flat: np.ndarray
    """float32 [parameters], the policy's parameters in ``named_parameters`` order."""
    sha256: str

    def verify(self) -> None:
        """Raises WeightsError where the buffer is not the one that was hashed."""
        actual = sha256_of(self.flat)
        if actual != self.sha256:
            raise WeightsError(f"weights of version {self.policy_version}: expected sha256 {self.sha256}, got {actual}")


def sha256_of(flat: np.ndarray) -> str:
    """Hex digest of the buffer's bytes."""
    return hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest()


@torch.no_grad()
def flatten_weights(policy: nn.Module, policy_version: int) -> Weights:
    """The policy's parameters as a new buffer."""
    flat = torch.cat([p.detach().reshape(-1).to("cpu", torch.float32) for p in policy.parameters()]).numpy()
    return Weights(policy_version, flat, sha256_of(flat))


@torch.no_grad()
def load_weights(policy: nn.Module, weights: Weights) -> None:
    """Copy a version into the policy.

    Raises:
        WeightsError: the number of parameters differs.
    """
    parameters = list(policy.parameters())
    expected = sum(p.numel() for p in parameters)
    if weights.flat.size != expected:
        raise WeightsError(
            f"weights of version {weights.policy_version}: expected {expected} parameters, got {weights.flat.size}"
        )
    with warnings.catch_warnings():
        # It may lie in read-only shared memory; here it is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        source = torch.from_numpy(weights.flat)
    for parameter, part in zip(parameters, source.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
