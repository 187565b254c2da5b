"""What a policy is told about its observations: plain data, saved with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class TokenObservation:
    """uint8 [num_tokens, 3] tokens of (coordinate, feature id, value), placed into planes of ``height`` x ``width``.

    The coordinate's high nibble is the row, the low nibble the column; 0xFF is padding. The last token written to a
    (plane, cell) wins. Tokens outside the window and of unknown features change nothing; ``count_ignored`` of
    ``policy.tokens.TokensToBox`` counts them.
    """

    width: int
    height: int
    num_tokens: int
    feature_normalizations: Sequence[float | None] | Mapping[int, float]
    """The value that becomes 1.0 in a feature's plane, by feature id. A feature with None has no plane of magnitudes;
    in a mapping, ids that are missing below the largest one get 1.0."""
    feature_names: Sequence[str] | None = None
    """By feature id; lets a checkpoint be matched to another environment by name."""
    categorical_features: Sequence[tuple[int, Sequence[str]]] = ()
    """(feature id, names of its values 0, 1, ...): each value has a plane of its own, after those of the magnitudes."""
    global_coordinate: int | None = None
    """Coordinate byte of tokens that belong to no cell: they go to the window's centre."""

    def __post_init__(self) -> None:
        norms = self.feature_normalizations
        if isinstance(norms, Mapping):
            norms = [norms.get(i, 1.0) for i in range(max(norms, default=-1) + 1)]
        object.__setattr__(self, "feature_normalizations", tuple(norms))
        categorical = tuple((int(feature), tuple(values)) for feature, values in self.categorical_features)
        object.__setattr__(self, "categorical_features", categorical)
        if self.feature_names is not None:
            object.__setattr__(self, "feature_names", tuple(self.feature_names))
        if not (1 <= self.width <= 16 and 1 <= self.height <= 16):
            raise ValueError(
                f"a token window must be 1..16 cells wide and high (a nibble each), got {self.width}x{self.height}"
            )
        if len(self.feature_normalizations) > 256 or not self.feature_normalizations:
            raise ValueError(
                f"feature ids are one byte: expected 1..256 normalizations, got {len(self.feature_normalizations)}"
            )
        bad = {i: norm for i, norm in enumerate(self.feature_normalizations) if norm is not None and not norm > 0}
        if bad:
            raise ValueError(f"feature normalizations divide the values and must be positive, got {bad} by feature id")
        if self.feature_names is not None and len(self.feature_names) != len(self.feature_normalizations):
            raise ValueError(
                f"feature_names ({len(self.feature_names)}) and feature_normalizations "
                f"({len(self.feature_normalizations)}) must have one entry per feature id"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.num_tokens, 3)

    @property
    def planes(self) -> tuple[tuple[int, int | None], ...]:
        """(feature id, None) for a plane of magnitudes, (feature id, value) for a categorical one, in plane order."""
        magnitudes = [(i, None) for i, norm in enumerate(self.feature_normalizations) if norm is not None]
        return (*magnitudes, *((f, v) for f, values in self.categorical_features for v in range(len(values))))


@dataclasses.dataclass(frozen=True, slots=True)
class VectorObservation:
    """float32 [size]."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.size,)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageObservation:
    """uint8 [height, width, channels], scaled to 0..1."""

    height: int
    width: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.height, self.width, self.channels)


Observation = TokenObservation | VectorObservation | ImageObservation

_KINDS: dict[str, type[Observation]] = {
    "tokens": TokenObservation,
    "vector": VectorObservation,
    "image": ImageObservation,
}


def observation_to_json(observation: Observation) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(observation, cls))
    return {"kind": kind, **dataclasses.asdict(observation)}


def observation_from_json(data: Mapping[str, Any]) -> Observation:
    """The inverse of ``observation_to_json``."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    return _KINDS[data["kind"]](**fields)
