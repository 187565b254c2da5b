"""Translate an environment's gymnasium spaces and metadata into an ``EnvSpec``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from shoal.envs.actions import policy_actions
from shoal.envs.boundary import (
    DictSpace,
    EnvSpec,
    ImageSpace,
    Space,
    Stored,
    TokenSpace,
    VectorSpace,
)
from shoal.envs.config import AdapterOptions, Layout
from shoal.envs.images import find_image
from shoal.envs.masks import MaskSource, find_mask
from shoal.envs.old_interface import present_space
from shoal.envs.space_json import space_from_json, space_to_json
from shoal.envs.writers import leaves_of, parts_of


@dataclasses.dataclass(frozen=True, slots=True)
class Declared:
    """Spaces of one slot; plain data that crosses to other processes."""

    observation: spaces.Space[Any]
    action: spaces.Space[Any]
    tokens: Any = None
    """``metadata["token_space"]``: a ``TokenSpace`` or its arguments, if observations are tokens."""
    action_meanings: tuple[str, ...] = ()
    mask: MaskSource | None = None
    """Where the masks of legal actions are, which are no part of ``observation``."""


def declared_by(
    env_id: str, env: Any, observation: spaces.Space[Any], action: spaces.Space[Any], info: Any = None
) -> Declared:
    """Read an environment's metadata, its actions' names and, from the ``info`` of a reset, whether it has masks.

    Raises:
        ValueError: a space is none, or observations have a mask that is none of these actions.
    """
    observation, action = (
        present_space(space, f"{env_id}: the {what}")
        for space, what in ((observation, "observation space"), (action, "action space"))
    )
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    names: tuple[str, ...] = ()
    if callable(meanings):
        with contextlib.suppress(Exception):  # a name is a nicety
            names = tuple(str(name) for name in meanings())
    observation, mask = find_mask(env_id, observation, action, info)
    return Declared(observation, action, (getattr(env, "metadata", None) or {}).get("token_space"), names, mask)


def declared_to_json(declared: Declared) -> dict[str, Any]:
    """Plain data, for checkpoints."""
    tokens = declared.tokens
    return {
        "observation": space_to_json(declared.observation),
        "action": space_to_json(declared.action),
        "tokens": dataclasses.asdict(tokens) if isinstance(tokens, TokenSpace) else tokens,
        "action_meanings": list(declared.action_meanings),
        "mask": None if declared.mask is None else dataclasses.asdict(declared.mask),
    }


def declared_from_json(data: Mapping[str, Any]) -> Declared:
    """The inverse of ``declared_to_json``."""
    tokens = data["tokens"]
    if tokens is not None:
        tokens = {name: tuple(value) if isinstance(value, list) else value for name, value in tokens.items()}
        categorical = tokens.get("categorical_features", ())
        tokens["categorical_features"] = tuple((feature, tuple(values)) for feature, values in categorical)
        tokens = TokenSpace(**tokens)
    mask = data.get("mask")
    return Declared(
        space_from_json(data["observation"]),
        space_from_json(data["action"]),
        tokens,
        tuple(data["action_meanings"]),
        None if mask is None else MaskSource(mask["where"], tuple(mask["sizes"]), mask["part"]),
    )


def make_spec(
    env_id: str,
    declared: Declared,
    options: AdapterOptions | None = None,
    *,
    same_step: bool = False,
    num_agents: int = 1,
) -> EnvSpec:
    """The spec of an environment.

    Raises:
        ValueError: a space is of a kind that the policy has no encoder or head for.
    """
    return EnvSpec(
        env_id=env_id,
        observation=_observation(declared, options or AdapterOptions(), env_id),
        actions=policy_actions(declared.action, declared.observation, declared.action_meanings, env_id),
        same_step=same_step,
        num_agents=num_agents,
        spaces=declared_to_json(declared),
        num_mask=sum(declared.mask.sizes) if declared.mask else 0,
        declared=said(declared.observation),
    )


def said(space: spaces.Space[Any]) -> str:
    """A space in a few words, without the bounds of its numbers."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return f"{type(space).__name__} of {', '.join(f'{key} {said(inner)}' for key, inner in parts_of(space))}"
    return f"{space.dtype} {space.shape}" if isinstance(space, spaces.Box) else str(space)


def _observation(declared: Declared, options: AdapterOptions, env_id: str) -> Space:
    space, tokens = declared.observation, declared.tokens
    is_bytes = isinstance(space, spaces.Box) and space.dtype == np.uint8
    if tokens is not None:
        found = tokens if isinstance(tokens, TokenSpace) else TokenSpace(**tokens)
        if not is_bytes or space.shape != (found.num_tokens, 3):
            raise ValueError(
                f"{env_id}: metadata['token_space'] says uint8 {(found.num_tokens, 3)}, observation space is {space}"
            )
        return found
    _check_observation(space, (), space, env_id)
    if spaces.flatdim(space) == 0:
        raise ValueError(
            f"{env_id}: the observation space {said(space)} holds no number; for a task without observations give a "
            "Box of shape (1,) that is always 0"
        )
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return _parts(space, options, env_id)
    if not isinstance(options.image_layout, str):
        raise ValueError(
            f"{env_id}: env.image_layout={options.image_layout} is for the parts of a Dict or Tuple, the observation "
            f"space is {said(space)}; give one layout"
        )
    if isinstance(space, spaces.Box) and (image := find_image(space, options.image_layout, env_id)):
        return image
    if options.image_layout not in ("auto", "none"):
        raise ValueError(
            f"{env_id}: env.image_layout={options.image_layout} is for boxes of numbers, the observation space is "
            f"{said(space)}; leave it out"
        )
    size = spaces.flatdim(space)
    categorical = () if isinstance(space, spaces.Box) else tuple(range(size))
    return VectorSpace(size=size, categorical=categorical, stored=_stored([space]))


def _stored(leaves: Sequence[spaces.Space[Any]]) -> Stored:
    """The narrowest type that holds the numbers of all of these."""
    narrow: Mapping[str, Stored] = {"float16": "float16", "int16": "int16", "int8": "int8", "uint8": "uint8"}
    # Codes are 0 and 1, and so are flags.
    types = {leaf.dtype if isinstance(leaf, spaces.Box) and leaf.dtype != np.bool_ else np.uint8 for leaf in leaves}
    return narrow.get(np.result_type(*types).name, "float32")


def _parts(space: spaces.Dict | spaces.Tuple[Any], options: AdapterOptions, env_id: str) -> VectorSpace | DictSpace:
    """How the parts of ``space`` are read: images, and everything else as numbers, in layout order."""
    leaves = list(leaves_of(space))
    found = {
        index: image
        for index, (keys, inner) in enumerate(leaves)
        if isinstance(inner, spaces.Box)
        and (image := find_image(inner, _layout_of(inner, path_of(keys), options), f"{env_id}: {path_of(keys)}"))
    }
    if not isinstance(options.image_layout, str):
        boxes = [path_of(keys) for keys, inner in leaves if isinstance(inner, spaces.Box)]
        if unknown := sorted(options.image_layout.keys() - set(boxes)):
            raise ValueError(
                f"{env_id}: env.image_layout names {', '.join(unknown)}; boxes of numbers are "
                f"{', '.join(boxes) or 'none'}"
            )
    elif not found and options.image_layout not in ("auto", "none"):
        raise ValueError(f"{env_id}: env.image_layout={options.image_layout}, but no part of {said(space)} is an image")
    categorical: list[int] = []
    size = 0
    for index, (_, inner) in enumerate(leaves):
        if index not in found:
            start, size = size, size + spaces.flatdim(inner)
            categorical += [] if isinstance(inner, spaces.Box) else range(start, size)
    names, images = _named(leaves, found, path_of)
    if len({*names, *images}) < len(names) + len(images):
        names, images = _named(leaves, found, _exact_path)
    numbers = VectorSpace(size=size, names=tuple(names), categorical=tuple(categorical))
    if not found:
        return dataclasses.replace(numbers, stored=_stored([inner for _, inner in leaves]))
    return DictSpace(numbers=numbers, images=tuple(zip(images, found.values(), strict=True)), leaves=tuple(found))


def _layout_of(part: spaces.Box, path: str, options: AdapterOptions) -> Layout:
    """The layout that a part is read with; one for all that speaks of channels says nothing of parts without them."""
    if not isinstance(options.image_layout, str):
        return options.image_layout.get(path, "auto")
    return options.image_layout if options.image_layout == "none" or len(part.shape) in (3, 4) else "auto"


def _named(
    leaves: Sequence[tuple[tuple[Any, ...], spaces.Space[Any]]],
    images: Mapping[int, ImageSpace],
    path: Callable[[Sequence[Any]], str],
) -> tuple[list[str], list[str]]:
    """Names of the numbers, and of the images, which are at these places among the leaves."""
    numbers = [
        name for index, (keys, inner) in enumerate(leaves) if index not in images for name in _names(inner, path(keys))
    ]
    return numbers, [path(leaves[index][0]) for index in images]


def _check_observation(space: spaces.Space[Any], keys: tuple[Any, ...], whole: spaces.Space[Any], env_id: str) -> None:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, inner in parts_of(space):
            _check_observation(inner, (*keys, key), whole, env_id)
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        instead = "turn it into numbers by a wrapper of yours (env.wrappers)"
        if len(keys) == 1 and isinstance(whole, spaces.Dict) and len(whole.spaces) > 1:
            rest = ", ".join(str(key) for key in whole.spaces if key != keys[0])
            instead = (
                f"leave it out by env.wrappers='[{{gymnasium.wrappers:FilterObservation: {{filter_keys: [{rest}]}}}}]',"
                f" or {instead}"
            )
        raise ValueError(
            f"{env_id}: obs{_exact_path(keys)} is a {type(space).__name__} space, which has no fixed size; {instead}; "
            "supported: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple"
        )


def path_of(keys: Sequence[Any]) -> str:
    """``goal.kind``, ``obs[1]``."""
    found = ""
    for key in keys:
        if isinstance(key, str):
            found = f"{found}.{key}" if found else key
        else:
            found = f"{found or 'obs'}[{key}]"
    return found


def _exact_path(keys: Sequence[Any]) -> str:
    """Keys as Python writes them: where they have dots and brackets of their own, no two of these read alike."""
    return "".join(f"[{key!r}]" for key in keys)


def _names(space: spaces.Space[Any], path: str) -> Iterator[str]:
    """A name for every number that a writer writes of a part: ``position[0]``, ``goal.kind=2``, ``obs[1][0,3]``."""
    if isinstance(space, spaces.Discrete):
        yield from (f"{path}={value}" for value in range(space.start, space.start + space.n))
    elif isinstance(space, spaces.MultiDiscrete):
        for index in np.ndindex(space.nvec.shape):
            first = space.start[index]
            yield from (f"{path}{_indexed(index)}={value}" for value in range(first, first + space.nvec[index]))
    else:
        yield from (path + _indexed(index) for index in np.ndindex(space.shape or ()))


def _indexed(index: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, index))}]" if index else ""
