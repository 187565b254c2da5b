"""Settings of the policy, as plain data: importing them costs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Initialization:
    """Where the weights start. The defaults are those of the original Fast policy."""

    lstm_bias: Literal["ones", "forget", "zeros"] = "ones"
    """``ones``: every LSTM bias 1 (each gate starts at +2); ``forget``: 1 on the forget gate, else 0; ``zeros``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The network."""

    kind: Literal["fast"] = "fast"
    embedding_rows: int = 100
    """Rows of the action embedding table: the most actions that a policy can have."""
    initialization: Initialization = dataclasses.field(default_factory=Initialization)

    def __post_init__(self) -> None:
        if self.embedding_rows < 1:
            raise ValueError(f"embedding_rows={self.embedding_rows} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RegularizationConfig:
    """Both are off by default, as in the original."""

    clip_scale: float = 0.0
    """Bound of each weight tensor, as a multiple of its largest |w| at initialisation; 0 turns clipping off."""
    clip_floor: float = 0.01
    """No bound is smaller than this, so tensors that start at zero can move."""
    clip_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Clip scale by component (``cnn1``, ``lstm`` ...) in place of ``clip_scale``; 0 leaves the component alone."""
    l2_init_coef: float = 0.0
    """Weight of sum (w - w_init)^2 in the loss; 0 turns it off."""
    l2_init_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Factor on ``l2_init_coef`` by component; 0 leaves the component alone."""

    def __post_init__(self) -> None:
        for name in ("clip_scale", "clip_floor", "l2_init_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
