"""Recognises images among boxes of numbers: which axes are height and width, which are channels and frames.

Used by ``envs.spaces``. Whatever could be read in two ways is refused with the setting that decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from shoal.envs.boundary import ImageSpace
from shoal.envs.config import Layout

_PICTURE_SIDE = 16
"""A matrix with a shorter side than this may be a table; with ``auto`` only larger ones are, or may be, grey images."""
_SHADES = ((0.0, 255.0), (0.0, 1.0))
"""The bounds of grey images."""
_BOARD_SIDE = 8
"""Boxes with shorter sides than this are no pictures: with ``auto`` their numbers are read one by one."""
_FEW = 4
"""An axis of at most this length may be the channels'."""


class _Axes(NamedTuple):
    height: int
    width: int
    planes: tuple[int, ...]
    """Axes whose product are the image's channels: frames, then channels."""


def find_image(space: spaces.Box, layout: Layout, env_id: str) -> ImageSpace | None:
    """How ``space`` is read as an image; None if its numbers are read one by one.

    Raises:
        ValueError: with layout ``auto``, it could be read in more than one way; with another, it has too few or too
            many axes.
    """
    shape = space.shape
    if layout == "none":
        return None
    if layout != "auto":
        if not 2 <= len(shape) <= 4:
            raise ValueError(
                f"{env_id}: env.image_layout={layout} is for boxes of 2 to 4 axes (height and width, channels, and a "
                f"stack of frames before these), the observation space is {_said(space)}; set env.image_layout=none"
            )
        return _image(space, _axes(shape, layout))
    if not _may_be_image(space):
        return None
    if len(shape) == 2:
        if _bounds(space) in _SHADES:
            return _image(space, _Axes(0, 1, ()))
        raise ValueError(
            f"{env_id}: the observation space {_said(space)} may be a grey image or a table of numbers; set "
            "env.image_layout to channels_last for an image, or to none"
        )
    if sorted(shape)[-2] < _BOARD_SIDE:
        return None
    # Numbers without common bounds may be anything, whatever their shape.
    axes = _guess(shape) if len(shape) <= 4 and (space.dtype == np.uint8 or _bounds(space)) else None
    if axes is None:
        raise ValueError(
            f"{env_id}: the observation space {_said(space)} may be an image with its channels last or first, or no "
            "image at all; set env.image_layout to channels_last, channels_first or none"
        )
    if min(shape[axes.height], shape[axes.width]) < _BOARD_SIDE:
        return None
    return _image(space, axes)


def _may_be_image(space: spaces.Box) -> bool:
    """Whether ``auto`` looks for an image in this box at all."""
    shape = space.shape
    if len(shape) < 2 or 0 in shape:
        return False
    if len(shape) == 2:
        # Numbers without common bounds are no shades.
        return min(shape) >= _PICTURE_SIDE and _bounds(space) is not None
    return space.dtype == np.uint8 or (len(shape) <= 4 and sorted(shape)[-2] >= _BOARD_SIDE)


def _guess(shape: Sequence[int]) -> _Axes | None:
    """The axes of an image of three or four; None where they could be others."""
    last, first = _axes(shape, "channels_last"), _axes(shape, "channels_first")
    is_last, is_first = (_is_likely(shape, axes, other) for axes, other in ((last, first), (first, last)))
    if is_last == is_first:
        return None
    axes = last if is_last else first
    sides = shape[axes.height], shape[axes.width]
    # A stack of more frames than an image has rows is likelier a box of depth.
    return axes if len(axes.planes) == 1 or shape[0] < min(sides) else None


def _is_likely(shape: Sequence[int], axes: _Axes, other: _Axes) -> bool:
    """Whether the sides are equal or both longer than the channels, and no side looks like channels itself."""
    height, width, channels = shape[axes.height], shape[axes.width], shape[axes.planes[-1]]
    other_height, other_width = shape[other.height], shape[other.width]
    if height == width or other_height == other_width:
        return height == width and other_height != other_width
    return channels < min(height, width) and shape[other.planes[-1]] > _FEW


def _axes(shape: Sequence[int], layout: Layout) -> _Axes:
    if len(shape) == 2:
        return _Axes(0, 1, ())
    frames = tuple(range(len(shape) - 3))
    a, b, c = range(len(shape) - 3, len(shape))
    return _Axes(a, b, (*frames, c)) if layout == "channels_last" else _Axes(b, c, (*frames, a))


def _image(space: spaces.Box, axes: _Axes) -> ImageSpace:
    is_byte = space.dtype == np.uint8
    bounds = _bounds(space)
    low, high = bounds or ((0.0, 255.0) if is_byte else (-1.0, 1.0))
    whole = is_byte or space.dtype == np.bool_ or (np.issubdtype(space.dtype, np.integer) and bounds is not None)
    return ImageSpace(
        height=space.shape[axes.height],
        width=space.shape[axes.width],
        channels=int(np.prod([space.shape[axis] for axis in axes.planes], dtype=int)),
        dtype="uint8" if whole and low >= 0 and high <= 255 else "float32",
        scale=max(abs(low), abs(high)) or 1.0,
        axes=(axes.height, axes.width, *axes.planes),
    )


def _bounds(space: spaces.Box) -> tuple[float, float] | None:
    """Finite bounds that all numbers share; None if there are none."""
    low, high = float(np.min(space.low)), float(np.max(space.high))
    shared = bool((space.low == space.low.flat[0]).all() and (space.high == space.high.flat[0]).all())
    return (low, high) if shared and np.isfinite([low, high]).all() else None


def _said(space: spaces.Box) -> str:
    return f"{space.dtype} {space.shape}"
