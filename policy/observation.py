"""Descriptions of observations as plain data, saved with the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

ImageEncoder = Literal["small", "residual"]
"""The encoders of images. ``small``: two convolutions. ``residual``: three residual sections, as IMPALA has them."""
SMALL, RESIDUAL = get_args(ImageEncoder)


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
    """The value that becomes 1.0 in a feature's plane, by feature id. A feature with None has no plane of magnitudes.
    In a mapping, missing ids below the largest one get 1.0."""
    feature_names: Sequence[str] | None = None
    """Names by feature id; they let a checkpoint be matched to another environment by name."""
    categorical_features: Sequence[tuple[int, Sequence[str]]] = ()
    """(feature id, names of its values 0, 1, ...): each value has a plane of its own, after those of the magnitudes."""
    global_coordinate: int | None = None
    """Coordinate byte of tokens that belong to no cell: they go to the window's centre."""
    left_out: Sequence[tuple[int, int | None]] = ()
    """Tokens that the user left out on purpose: (feature id, None), or (feature id, value) of a categorical one.
    They change nothing and do not count as ignored."""

    def __post_init__(self) -> None:
        norms = self.feature_normalizations
        if isinstance(norms, Mapping):
            norms = [norms.get(i, 1.0) for i in range(max(norms, default=-1) + 1)]
        object.__setattr__(self, "feature_normalizations", tuple(norms))
        categorical = tuple((int(feature), tuple(values)) for feature, values in self.categorical_features)
        object.__setattr__(self, "categorical_features", categorical)
        object.__setattr__(self, "left_out", tuple((feature, value) for feature, value in self.left_out))
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
    def dtype(self) -> str:
        """Of the rows."""
        return "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.num_tokens, 3)

    @property
    def planes(self) -> tuple[tuple[int, int | None], ...]:
        """(feature id, None) for a plane of magnitudes, (feature id, value) for a categorical one, in plane order."""
        magnitudes = [(i, None) for i, norm in enumerate(self.feature_normalizations) if norm is not None]
        return (*magnitudes, *((f, v) for f, values in self.categorical_features for v in range(len(values))))

    @property
    def plane_names(self) -> tuple[tuple[str, str | None], ...]:
        """(feature name, None) for a plane of magnitudes, (feature name, value name) for a categorical one, in plane
        order; without feature names the first is ""."""
        names = self.feature_names or [""] * len(self.feature_normalizations)
        magnitudes = [(names[i], None) for i, norm in enumerate(self.feature_normalizations) if norm is not None]
        return (*magnitudes, *((names[f], value) for f, values in self.categorical_features for value in values))

    def planes_of(self, presented: TokenObservation) -> tuple[tuple[int, int | None, int], ...]:
        """Match the tokens of ``presented`` with the planes of this observation by name.

        Returns (feature id, value or None, plane) with the ids of ``presented``; others are omitted.

        Raises:
            ValueError: the windows differ in size, or the features differ and some are unnamed or share a name.
        """
        self.check_window(presented)
        left_out = set(presented.left_out)
        planes = range(len(self.planes))
        if self._features() != presented._features():
            names = self.plane_names
            if not all(feature for feature, _ in (*names, *presented.plane_names)):
                raise ValueError(
                    "the environment's features are not those that the policy was trained with, and without a name for "
                    f"each they cannot be matched: trained with {self}, the environment has {presented}"
                )
            if twice := [shown(name) for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"features cannot be matched by name: the policy was trained with two of {twice}")
            plane_of = dict(zip(names, planes, strict=True))
            found = [plane_of.get(name) for name in presented.plane_names]
        else:
            found = list(planes)
        return tuple(
            (feature, value, plane)
            for (feature, value), plane in zip(presented.planes, found, strict=True)
            if plane is not None and not left_out & {(feature, None), (feature, value)}
        )

    def check_window(self, presented: TokenObservation) -> None:
        """Raise ValueError if the window of ``presented`` has another size."""
        if (self.width, self.height) != (presented.width, presented.height):
            raise ValueError(
                f"the policy was trained with a window of {self.width}x{self.height} cells (width x height), the "
                f"environment's is {presented.width}x{presented.height}: no mapping makes up for that"
            )

    def _features(self) -> tuple[Any, ...]:
        return (self.feature_normalizations, self.feature_names, self.categorical_features)


@dataclasses.dataclass(frozen=True, slots=True)
class VectorObservation:
    """float32 [size]."""

    size: int
    names: Sequence[str] | None = None
    """Names by column; they let a checkpoint be matched to another environment by name. A column left out has ""."""
    categorical: Sequence[int] = ()
    """Columns of one-hot codes and flags, which are not normalized."""
    stored: str = dataclasses.field(default="float32", compare=False)
    """Type of the numbers in unrolls: ``float32``, or ``float16``, ``int16``, ``int8`` or ``uint8`` in rows of bytes
    (``policy.byte_rows``). Weights do not depend on it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "categorical", tuple(self.categorical))
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
            if len(self.names) != self.size:
                raise ValueError(f"names ({len(self.names)}) must have one entry per column ({self.size})")

    @property
    def dtype(self) -> str:
        """Of the rows."""
        return "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.size,)

    def columns_of(self, presented: VectorObservation) -> tuple[int | None, ...] | None:
        """For each column the column of ``presented`` that has its name, or None if there is none.

        The result as a whole is None if no column moves: this side has no names, or both have the same in one order.

        Raises:
            ValueError: only this side has names, a name occurs twice, or there are no names and the sizes differ.
        """
        if self.names is None or self.names == presented.names:
            if self.size != presented.size:
                raise ValueError(
                    f"the policy was trained with {self.size} numbers without names, the environment has "
                    f"{presented.size}: they cannot be matched"
                )
            return None
        if presented.names is None:
            raise ValueError(
                f"the policy was trained with numbers named {list(self.names)}, the environment names none of its "
                f"{presented.size}: they cannot be matched"
            )
        for names in (self.names, filter(None, presented.names)):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"columns cannot be matched by name: there are two of {twice}")
        column_of = {name: column for column, name in enumerate(presented.names) if name}
        return tuple(column_of.get(name) for name in self.names)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageObservation:
    """[height, width, channels] in ``dtype``, whatever the environment's order; networks divide it by ``scale``."""

    height: int
    width: int
    channels: int
    dtype: str = "uint8"
    """``uint8`` or ``float32``."""
    scale: float = 255.0
    """The largest magnitude that the environment declares: 255 of bytes."""
    kernels: Sequence[tuple[int, int]] | None = None
    """(kernel, stride) of the two convolutions of the encoder ``small``, of others none; None chooses them by size
    (``image_kernels``). They are saved with the weights, so that weights stay usable where the choice changes."""
    encoder: ImageEncoder = SMALL
    """What reads it (``policy.image_encoder``)."""

    def __post_init__(self) -> None:
        if self.encoder not in get_args(ImageEncoder):
            raise ValueError(f"an image's encoder is {SMALL} or {RESIDUAL}, got {self.encoder!r}")
        kernels = self.kernels
        if kernels is None:
            kernels = image_kernels(self.height, self.width) if self.encoder == SMALL else ()
        object.__setattr__(self, "kernels", tuple((int(kernel), int(stride)) for kernel, stride in kernels))
        if len(self.kernels or ()) != (2 if self.encoder == SMALL else 0):
            what = "two convolutions" if self.encoder == SMALL else f"no kernels of its own with encoder {self.encoder}"
            raise ValueError(f"an image has {what}, got kernels {self.kernels}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.height, self.width, self.channels)


_SMALL_SIDE = 36
"""The shortest side that a kernel of 8 and then one of 4 leave more than two cells of."""
_KERNELS = ((3, 1), (3, 1)), ((4, 2), (3, 1)), ((4, 2), (4, 2)), ((8, 4), (4, 2)), ((8, 4), (8, 4)), ((16, 8), (8, 4))
_FIRST_OF_LARGE = 3
_MOST_CELLS = 64
"""Most cells that are left of a small image: 4,096 features of 64 channels."""
_MOST_CELLS_OF_LARGE = 100
"""The same of a large one: what the usual kernels, of 8 and 4, leave of 96 x 96 pixels."""


def image_kernels(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """(kernel, stride) of two convolutions that leave few cells of an image, and more than a few of a tiny one.

    Images of 36 pixels and more have the usual ones of 8 and 4 pixels, or larger ones; up to 12 x 12 pixels no cell is
    skipped.
    """
    small = min(height, width) < _SMALL_SIDE
    choices, most = (_KERNELS, _MOST_CELLS) if small else (_KERNELS[_FIRST_OF_LARGE:], _MOST_CELLS_OF_LARGE)
    return next(
        (kernels for kernels in choices if _cells(height, kernels) * _cells(width, kernels) <= most), choices[-1]
    )


def _cells(side: int, kernels: Sequence[tuple[int, int]]) -> int:
    for kernel, stride in kernels:
        side = (side - min(kernel, side)) // stride + 1
    return side


def _kernels_of_before(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The choice for weights that were saved without their kernels."""
    return ((8, 4), (4, 2)) if min(height, width) >= _SMALL_SIDE else ((3, 1), (3, 1))


@dataclasses.dataclass(frozen=True, slots=True)
class DictObservation:
    """float32 [size]: numbers, and behind them images, each [height, width, channels] flattened. Unrolls have rows of
    bytes of it where there are images of bytes (``policy.byte_rows``)."""

    numbers: VectorObservation
    """Of size 0 where there are images alone."""
    images: Sequence[tuple[str, ImageObservation]]
    """Images by name, in the order of the rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple((str(name), image) for name, image in self.images))
        names = [name for name, _ in self.images]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a DictObservation has images with names of their own, got {names}")

    @property
    def dtype(self) -> str:
        """Of the rows."""
        return "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.numbers.size + sum(math.prod(image.shape) for _, image in self.images),)

    @property
    def spans(self) -> tuple[slice, ...]:
        """The columns of each image."""
        found, start = [], self.numbers.size
        for _, image in self.images:
            found.append(slice(start, start + math.prod(image.shape)))
            start = found[-1].stop
        return tuple(found)


_Sort = TypeVar("_Sort", bound="Observation | None")
Observation = TokenObservation | VectorObservation | ImageObservation | DictObservation


def numbers_of(observation: Observation) -> VectorObservation | None:
    """The part of an observation that is numbers, which come first in its rows; None where there is none."""
    if isinstance(observation, DictObservation):
        return observation.numbers
    return observation if isinstance(observation, VectorObservation) else None


def image_encoders(observation: Observation) -> dict[str, ImageEncoder]:
    """The encoder of every image, by name; the name of an observation that is an image itself is ""."""
    if isinstance(observation, DictObservation):
        return {name: image.encoder for name, image in observation.images}
    return {"": observation.encoder} if isinstance(observation, ImageObservation) else {}


EncoderChoice = ImageEncoder | Mapping[str, ImageEncoder]
"""``policy.image_encoder``: of all images, or by name; those that are not named have the default."""


def chosen_encoder(choice: EncoderChoice, name: str) -> ImageEncoder:
    """The encoder of the image ``name``."""
    return choice if isinstance(choice, str) else choice.get(name, SMALL)


def written(choice: EncoderChoice) -> str:
    """The choice as YAML, on one line."""
    if isinstance(choice, str):
        return choice
    return "{" + ", ".join(f"{written_name(name)}: {encoder}" for name, encoder in choice.items()) + "}"


def written_name(name: str) -> str:
    """A name as a key of a mapping in YAML: in quotes where it would be read as something else."""
    if re.fullmatch(r"[^\W\d][\w.-]*", name) and name.lower() not in ("null", "true", "false"):
        return name
    return json.dumps(name, ensure_ascii=not name.isprintable())


def encoded_by(observation: _Sort, choice: EncoderChoice) -> _Sort:
    """The observation with its images read by the encoders of ``choice``."""

    def encoded(name: str, image: ImageObservation) -> ImageObservation:
        encoder = chosen_encoder(choice, name)
        # The kernels of one that stays may be those of older weights.
        return image if encoder == image.encoder else dataclasses.replace(image, encoder=encoder, kernels=None)

    if isinstance(observation, DictObservation):
        images = [(name, encoded(name, image)) for name, image in observation.images]
        return dataclasses.replace(observation, images=images)
    return cast("_Sort", encoded("", observation)) if isinstance(observation, ImageObservation) else observation


def shown(plane_name: tuple[str, str | None]) -> str:
    """A plane's name as users read and write it: ``feature``, or ``feature:value``."""
    feature, value = plane_name
    return feature if value is None else f"{feature}:{value}"


_KINDS: dict[str, type[Observation]] = {
    "tokens": TokenObservation,
    "vector": VectorObservation,
    "image": ImageObservation,
    "dict": DictObservation,
}


def observation_to_json(observation: Observation) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(observation, cls))
    found = {"kind": kind, **dataclasses.asdict(observation)}
    for numbers in (found, found.get("numbers", {})):
        if numbers.get("stored") == "float32":  # what descriptions without it mean
            del numbers["stored"]
    for image in [found, *(image for _, image in found.get("images", ()))]:
        if image.get("encoder") == SMALL:  # what descriptions without one mean, so that equal policies have equal ones
            del image["encoder"]
    return found


def observation_from_json(data: Mapping[str, Any]) -> Observation:
    """The inverse of ``observation_to_json``."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    if data["kind"] == "dict":
        images = [(name, ImageObservation(**image)) for name, image in data["images"]]
        return DictObservation(VectorObservation(**data["numbers"]), images)
    if data["kind"] == "image" and "kernels" not in data:
        fields["kernels"] = _kernels_of_before(data["height"], data["width"])
    return _KINDS[data["kind"]](**fields)
