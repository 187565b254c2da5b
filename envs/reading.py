"""Says in a line how an environment's observations are read and how its actions are taken."""

from __future__ import annotations

import math
from collections.abc import Callable

from gymnasium import spaces
from shoal.envs.actions import NO_BOUND
from shoal.envs.boundary import ContinuousActions, DictSpace, EnvSpec, ImageSpace, TokenSpace, VectorSpace
from shoal.envs.spaces import declared_from_json, path_of, said
from shoal.envs.writers import leaves_of

_MOST_CHARACTERS = 160
_MOST_PARTS = 40


def reading(spec: EnvSpec, encoder_of: Callable[[str], str] = lambda _: "") -> tuple[str, str]:
    """(observations, actions) in words, for the first lines of a run and for ``shoal doctor``.

    ``encoder_of`` gives the encoder of an image by its name, "" for the only one, and "" where that is not known.
    """
    return _observations(spec, encoder_of), _actions(spec)


def reading_by_part(spec: EnvSpec, encoder_of: Callable[[str], str] = lambda _: "") -> list[tuple[str, str]]:
    """(path, in words how it is read) of the parts of a Dict or Tuple, in the order of the environment; empty for
    other observations. Of very many the first ones, and a last entry that says so."""
    whole = None if spec.spaces is None else declared_from_json(spec.spaces).observation
    if not isinstance(whole, (spaces.Dict, spaces.Tuple)):
        return []
    space = spec.observation
    images = dict(zip(space.leaves, space.images, strict=True)) if isinstance(space, DictSpace) else {}
    found = []
    for index, (keys, part) in enumerate(leaves_of(whole)):
        if index in images:
            name, image = images[index]
            read = _image(image, encoder_of(name))
        else:
            name, size = path_of(keys), spaces.flatdim(part)
            codes = () if isinstance(part, spaces.Box) else tuple(range(size))
            read = _numbers(VectorSpace(size=size, categorical=codes))
        found.append((name, f"{said(part)} as {read}"))
    if len(found) > _MOST_PARTS:
        found[_MOST_PARTS:] = [("...", f"{len(found) - _MOST_PARTS:,} more")]
    return found


def _observations(spec: EnvSpec, encoder_of: Callable[[str], str]) -> str:
    space = spec.observation
    if isinstance(space, TokenSpace):
        named = sum(map(bool, space.feature_names))
        found = f"tokens of {named} features in a window of {space.width} x {space.height} cells, by a CNN"
    elif isinstance(space, ImageSpace):
        found = _image(space, encoder_of(""))
    elif isinstance(space, DictSpace):
        numbers = [_numbers(space.numbers)] if space.numbers.size else []
        found = ", and ".join(
            [*numbers, *(f"{name} as {_image(image, encoder_of(name))}" for name, image in space.images)]
        )
    else:
        found = _numbers(space)
    if not spec.declared:
        return found
    short = spec.declared if len(spec.declared) <= _MOST_CHARACTERS else spec.declared[: _MOST_CHARACTERS - 3] + "..."
    return f"{short} as {found}"


def _numbers(space: VectorSpace) -> str:
    found = f"{space.size:,} number" + "s" * (space.size > 1)
    codes = len(space.categorical)
    if not codes:
        return found
    return f"{found}, " + (f"{codes:,} of them 0 or 1" if codes < space.size else "each 0 or 1")


def _image(image: ImageSpace, encoder: str) -> str:
    channels = f"{image.channels} channel" + "s" * (image.channels > 1)
    return (
        f"an image ({_layout(image)}) of {image.height} x {image.width} pixels with {channels}, "
        f"divided by {image.scale:g}, by a {encoder + ' ' if encoder else ''}CNN"
    )


def _layout(image: ImageSpace) -> str:
    """The layout of the environment's own array."""
    match image.axes:
        case (0, 1):
            return "grey"
        case (0, 1, 2):
            return "channels last"
        case (1, 2, 0):
            return "channels first"
        case (1, 2, 0, 3):
            return "stacked frames, channels last"
        case _:
            return "stacked frames, channels first"


def _bound(bound: float) -> float:
    """As actions are mapped: infinite where it is none."""
    return bound if abs(bound) < NO_BOUND else math.copysign(math.inf, bound)


def _actions(spec: EnvSpec) -> str:
    actions = spec.actions
    if isinstance(actions, ContinuousActions):
        bounds = sorted({(_bound(low), _bound(high)) for low, high in zip(actions.low, actions.high, strict=True)})
        shown = ", ".join(f"[{low:g}, {high:g}]" for low, high in bounds[:3]) + ", ..." * (len(bounds) > 3)
        finite = [sum(map(math.isfinite, bound)) for bound in bounds]
        mapped = any(both == 2 and bound != (-1.0, 1.0) for both, bound in zip(finite, bounds, strict=True))
        onto = ", onto which [-1, 1] is mapped" * mapped
        one = "; [-1, 1] is moved inside a single bound" * (1 in finite)
        none = "; numbers without bounds are taken as they are, around [-1, 1]" * (0 in finite)
        return f"{len(actions.low)} number" + "s" * (len(actions.low) > 1) + f" within {shown}{onto}{one}{none}"
    sizes = [len(names) for names in actions.names]
    legal = ", of which a mask tells the legal ones" if spec.num_mask else ""
    if actions.scalar:
        return f"one of {sizes[0]}{legal}"
    return f"{len(sizes)} choices at once, of " + ", ".join(map(str, sizes[:8])) + ", ..." * (len(sizes) > 8) + legal
