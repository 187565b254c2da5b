"""Translate an environment's gymnasium spaces and metadata into an ``EnvSpec``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from shoal.envs.boundary import ContinuousActions, DiscreteActions, EnvSpec, ImageSpace, TokenSpace, VectorSpace
from shoal.envs.config import AdapterOptions
from shoal.envs.images import find_image
from shoal.envs.masks import MaskSource, find_mask
from shoal.envs.space_json import space_from_json, space_to_json
from shoal.envs.writers import parts_of


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


def declared_by(env: Any, observation: spaces.Space[Any], action: spaces.Space[Any], info: Any = None) -> Declared:
    """Read an environment's metadata, its actions' names and, from the ``info`` of a reset, whether it has masks."""
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    names = tuple(str(name) for name in meanings()) if callable(meanings) else ()
    observation, mask = find_mask(observation, action, info)
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
        actions=_actions(declared, env_id),
        same_step=same_step,
        num_agents=num_agents,
        spaces=declared_to_json(declared),
        num_mask=sum(declared.mask.sizes) if declared.mask else 0,
        declared=_said(declared.observation),
    )


def _said(space: spaces.Space[Any]) -> str:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return f"{type(space).__name__} of {', '.join(f'{key} {_said(inner)}' for key, inner in parts_of(space))}"
    return f"{space.dtype} {space.shape}" if isinstance(space, spaces.Box) else str(space)


def _observation(declared: Declared, options: AdapterOptions, env_id: str) -> TokenSpace | VectorSpace | ImageSpace:
    space, tokens = declared.observation, declared.tokens
    is_bytes = isinstance(space, spaces.Box) and space.dtype == np.uint8
    if tokens is not None:
        found = tokens if isinstance(tokens, TokenSpace) else TokenSpace(**tokens)
        if not is_bytes or space.shape != (found.num_tokens, 3):
            raise ValueError(
                f"{env_id}: metadata['token_space'] says uint8 {(found.num_tokens, 3)}, observation space is {space}"
            )
        return found
    if isinstance(space, spaces.Box) and (image := find_image(space, options.image_layout, env_id)):
        return image
    if options.image_layout not in ("auto", "none"):
        raise ValueError(
            f"{env_id}: env.image_layout={options.image_layout} is for one box of numbers, the observation space is "
            f"{_said(space)}; leave it out"
        )
    _check_observation(space, "obs", env_id)
    names = _unique_names(space) if isinstance(space, (spaces.Dict, spaces.Tuple)) else ()
    return VectorSpace(size=spaces.flatdim(space), names=names, categorical=tuple(_categorical(space, 0)))


def _categorical(space: spaces.Space[Any], start: int) -> Iterator[int]:
    """Indices of the numbers, counted from ``start``, that a writer writes as one-hot codes or flags."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for _, inner in parts_of(space):
            yield from _categorical(inner, start)
            start += spaces.flatdim(inner)
    elif not isinstance(space, spaces.Box):
        yield from range(start, start + spaces.flatdim(space))


def _check_observation(space: spaces.Space[Any], field: str, env_id: str) -> None:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, inner in parts_of(space):
            _check_observation(inner, f"{field}[{key!r}]", env_id)
    elif not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(
            f"{env_id}: {field} is a {type(space).__name__} space, which has no fixed size; supported: "
            "Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple"
        )


def _unique_names(space: spaces.Dict | spaces.Tuple[Any]) -> tuple[str, ...]:
    names = tuple(_names(space, "", _join))
    if len(set(names)) == len(names):
        return names
    # Keys with dots and brackets of their own: as Python writes the path, two never read alike.
    return tuple(_names(space, "", lambda prefix, key: f"{prefix}[{key!r}]"))


def _join(prefix: str, key: Any) -> str:
    if isinstance(key, str):
        return f"{prefix}.{key}" if prefix else key
    return f"{prefix or 'obs'}[{key}]"


def _names(space: spaces.Space[Any], prefix: str, join: Callable[[str, Any], str]) -> Iterator[str]:
    """A name for every number that a writer writes: ``position[0]``, ``goal.kind=2``, ``obs[1][0,3]``."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, inner in parts_of(space):
            yield from _names(inner, join(prefix, key), join)
    elif isinstance(space, spaces.Discrete):
        yield from (f"{prefix}={value}" for value in range(space.start, space.start + space.n))
    elif isinstance(space, spaces.MultiDiscrete):
        for index in np.ndindex(space.nvec.shape):
            first = space.start[index]
            yield from (f"{prefix}{_indexed(index)}={value}" for value in range(first, first + space.nvec[index]))
    else:
        yield from (prefix + _indexed(index) for index in np.ndindex(space.shape or ()))


def _indexed(index: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, index))}]" if index else ""


def _actions(declared: Declared, env_id: str) -> DiscreteActions | ContinuousActions:
    space = declared.action
    if isinstance(space, spaces.Discrete):
        names = declared.action_meanings
        if not len(names) == space.n == len(set(names)):
            names = tuple(f"action_{index}" for index in range(space.n))
        return DiscreteActions(names=(names,))
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        counts = [2] * int(np.prod(space.shape)) if isinstance(space, spaces.MultiBinary) else space.nvec.reshape(-1)
        several = tuple(tuple(f"action_{choice}_{i}" for i in range(count)) for choice, count in enumerate(counts))
        return DiscreteActions(names=several, scalar=False)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        low, high = space.low.reshape(-1), space.high.reshape(-1)
        return ContinuousActions(
            names=tuple(f"action_{index}" for index in range(len(low))),
            low=tuple(map(float, low)),
            high=tuple(map(float, high)),
        )
    raise ValueError(
        f"{env_id}: action space {space} is not supported; supported: "
        "Discrete, MultiDiscrete, MultiBinary, Box of floats"
    )


class ActionMap(NamedTuple):
    """How the policy's actions become the environment's: reshaped, then clip(action * scale + offset, low, high)."""

    shape: tuple[int, ...]
    scale: np.ndarray
    offset: np.ndarray
    low: np.ndarray | None
    """None: nothing is clipped."""
    high: np.ndarray | None
    dtype: np.dtype[Any]


def action_map(space: spaces.Space[Any]) -> ActionMap:
    """The map of an action space that ``make_spec`` takes."""
    shape = space.shape or ()
    if not isinstance(space, spaces.Box):
        start = np.asarray(getattr(space, "start", 0), np.int64)
        dtype = np.dtype(np.int8 if isinstance(space, spaces.MultiBinary) else np.int64)
        return ActionMap(shape, np.asarray(1, np.int64), start, None, None, dtype)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    # [-1, 1] is mapped onto the bounds where an action has both of them.
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    return ActionMap(shape, high / 2 - low / 2, low / 2 + high / 2, space.low, space.high, np.dtype(space.dtype))


def action_converter(space: spaces.Space[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Convert the policy's actions [B, *action_shape] to the batched action space."""
    shape, scale, offset, low, high, dtype = action_map(space)
    if low is None or high is None:
        return lambda action: (action.reshape(-1, *shape) + offset).astype(dtype, copy=False)
    return lambda action: np.clip(action.reshape(-1, *shape) * scale + offset, low, high).astype(dtype)
