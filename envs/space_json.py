"""Gymnasium's spaces as plain data, for checkpoints: a policy acts by them where its environment is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Plain data without infinities, of a space that ``envs.spaces.make_spec`` takes."""
    if isinstance(space, spaces.Dict):
        # A list of pairs: JSON's keys are strings, and their order is the layout's.
        return {"kind": "dict", "parts": [[key, space_to_json(inner)] for key, inner in space.spaces.items()]}
    if isinstance(space, spaces.Tuple):
        return {"kind": "tuple", "parts": [space_to_json(inner) for inner in space.spaces]}
    if isinstance(space, spaces.Discrete):
        return {"kind": "discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), space.start.tolist()
        return {"kind": "multi_discrete", "nvec": nvec, "start": start, "dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "multi_binary", "shape": list(space.shape)}
    assert isinstance(space, spaces.Box)
    return {
        "kind": "box",
        "shape": list(space.shape),
        "dtype": np.dtype(space.dtype).name,
        "low": _bounds(space.low),
        "high": _bounds(space.high),
    }


def space_from_json(data: Mapping[str, Any]) -> spaces.Space[Any]:
    """The inverse of ``space_to_json``."""
    match data["kind"]:
        case "dict":
            return spaces.Dict([(key, space_from_json(inner)) for key, inner in data["parts"]])
        case "tuple":
            return spaces.Tuple([space_from_json(inner) for inner in data["parts"]])
        case "discrete":
            return spaces.Discrete(data["n"], start=data["start"], dtype=_integer(data))
        case "multi_discrete":
            return spaces.MultiDiscrete(np.array(data["nvec"]), dtype=_integer(data), start=np.array(data["start"]))
        case "multi_binary":
            return spaces.MultiBinary(data["shape"])
    shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
    low, high = (_from_bounds(data[side], shape, dtype) for side in ("low", "high"))
    return spaces.Box(low, high, dtype=dtype.type)


def _integer(data: Mapping[str, Any]) -> type[np.integer[Any]]:
    found: type[np.integer[Any]] = np.dtype(data.get("dtype", "int64")).type  # once, it was not saved
    return found


def _bounds(bounds: np.ndarray) -> list[float | int | str]:
    """One bound for all elements where they are equal, otherwise one for each; JSON has no infinity."""
    flat = bounds.reshape(-1)
    if flat.size and (flat == flat[0]).all():
        flat = flat[:1]
    return [bound.item() if np.isfinite(bound) else str(bound) for bound in flat]


def _from_bounds(bounds: list[float | int | str], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    numbers = [float(bound) if isinstance(bound, str) else bound for bound in bounds]
    if len(numbers) == 1:
        return np.full(shape, numbers[0], dtype)
    return np.array(numbers, dtype).reshape(shape)
