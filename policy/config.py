"""Settings of the policy, as plain data: importing them costs nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from shoal.policy.graph import ComponentConfig, check


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Initialization:
    """Where the weights start. The defaults are those of the original Fast policy."""

    lstm_bias: Literal["ones", "forget", "zeros"] = "ones"
    """``ones``: every LSTM bias 1 (each gate starts at +2); ``forget``: 1 on the forget gate, else 0; ``zeros``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """The network."""

    kind: Literal["fast", "component"] = "fast"
    """``fast``: the network in plain PyTorch. ``component``: the same network put together from named components, which
    ``components`` change. Each loads the other's weights."""
    components: Mapping[str, ComponentConfig | None] = dataclasses.field(default_factory=dict)
    """By name: what is changed or added; null takes a component out. Only of kind ``component``."""
    embedding_rows: int = 100
    """Rows of the action embedding table: the most actions that a policy can have."""
    initialization: Initialization = dataclasses.field(default_factory=Initialization)
    map_features: Sequence[str] = dataclasses.field(default_factory=list)
    """``ENVIRONMENT=TRAINED`` for features that a resumed policy knows by another name; ``NAME=`` for one that it does
    not see, ``=NAME`` for one that is absent here."""
    map_actions: Sequence[str] = dataclasses.field(default_factory=list)
    """The same for actions; those of the environment cannot be left out."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={bad} must be of the form ENVIRONMENT=TRAINED, where one side may be empty"
            for name in ("map_features", "map_actions")
            if (bad := malformed(getattr(self, name)))
        ]
        if self.embedding_rows < 1:
            problems.append(f"embedding_rows={self.embedding_rows} must be at least 1")
        if self.components:
            problems += (
                check(self.components)
                if self.kind == "component"
                else ["components: the kind fast is one fixed network; set policy.kind to component"]
            )
        if problems:
            raise ValueError("\n".join(problems))


def malformed(mapping: Sequence[str]) -> list[str]:
    """Entries that are not ``ENVIRONMENT=TRAINED`` with something on one side at least."""
    return [entry for entry in mapping if "=" not in entry or entry == "="]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RegularizationConfig:
    """Weight clipping and the L2-init loss. Both are off by default, as in the original.

    Names, in the overrides and in ``exclude``, are those of components (``lstm``) or of parameters
    (``lstm.weight_hh_l0``), or patterns of either (``cnn*``, ``*.weight``). Of several that match, the last counts.
    """

    clip_scale: float = 0.0
    """Bound of each parameter, as a multiple of its largest |w| at initialisation; 0 turns clipping off."""
    clip_floor: float = 0.01
    """No bound is smaller than this, so that parameters that start at zero can move."""
    clip_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Clip scale by name, in place of ``clip_scale``; 0 leaves the parameters alone. ``action_embeddings`` begin so
    small (0.1) that logits stay within 1.6 times their scale: below 2 a policy cannot become sure of itself."""
    l2_init_coef: float = 0.0
    """Weight of sum (w - w_init)^2 in the loss; 0 turns it off."""
    l2_init_overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Factor on ``l2_init_coef`` by name; 0 leaves the parameters alone."""
    l2_init_reference_every: int = 0
    """Every so many policy versions the present weights take the place of w_init in the loss, before that version is
    saved; clip bounds stay. 0 keeps the initial weights."""
    exclude: Sequence[str] = dataclasses.field(default_factory=lambda: ["*bias*", "*norm*", "*log_std*"])
    """Parameters that are neither clipped nor drawn to w_init. A bound on these changes what the network can say, not
    how well it goes on learning: a clipped log-std fixes the exploration."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be a number that is not negative; {effect}"
            for name, effect in (
                ("clip_scale", "0 turns clipping off"),
                ("clip_floor", "0 lets a parameter that starts at zero never move"),
                ("l2_init_coef", "0 turns the loss off"),
                ("l2_init_reference_every", "0 keeps the initial weights"),
            )
            if not 0 <= getattr(self, name) < math.inf
        ]
        problems += [
            f"{field}={dict(getattr(self, field))} must hold numbers that are not negative; {name!r} has {value}, "
            "and 0 leaves it alone"
            for field in ("clip_overrides", "l2_init_overrides")
            for name, value in getattr(self, field).items()
            if not 0 <= value < math.inf
        ]
        if problems:
            raise ValueError("\n".join(problems))
