"""Write observations of gymnasium's spaces into rows of numbers, checking them against the space.

Used by every adapter of third-party environments. A writer takes the observation of one slot, or of a whole batch
whose every array has the slots as first dimension, and fills flat rows [slots, size].
"""

# B slots of a batch (1 for a single observation)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from shoal.envs.boundary import EnvSpec

Writer = Callable[[Any, np.ndarray], None]
"""(observation, rows [B, size]): writes the rows, or raises ``Malformed``."""

REWARD_LIMIT = 1e9
"""Largest magnitude of a valid reward: squared errors of its size leave float32 no digits for anything else."""
_BOUND_TOLERANCE = 1e-4
"""Relative; environments compute in float64 and clip in float32."""


class Malformed(Exception):
    """A result does not fit the environment's spaces; ``slot`` is the faulty one of a batch."""

    def __init__(self, text: str, slot: int | None = None) -> None:
        super().__init__(text)
        self.slot = slot


def make_writer(space: spaces.Space[Any], spec: EnvSpec, *, batched: bool) -> Writer:
    """The writer of a space's observations into rows [B, size] of the spec's dtype.

    Args:
        space: One slot's observation space.
        spec: Made from it by ``envs.spaces.make_spec``, which refuses spaces that have no writer.
        batched: Whether observations come for all slots at once, as a gymnasium vector environment gives them.
    """
    write = _space_writer(space, "obs", batched)
    if spec.obs_dtype == np.uint8:
        return write

    def write_finite(obs: Any, rows: np.ndarray) -> None:
        write(obs, rows)
        finite = np.isfinite(rows)
        if not finite.all():
            slot, index = _first(~finite)
            raise Malformed(f"obs has a value that is not finite, {rows[slot, index]}, at flat index {index}", slot)

    return write_finite


def _space_writer(space: spaces.Space[Any], field: str, batched: bool) -> Writer:
    """Like ``gymnasium.spaces.flatten`` to float32, but checking, and into rows that exist."""
    if isinstance(space, spaces.Box):
        return _box_writer(space, field, batched)
    if isinstance(space, spaces.Discrete):
        return _one_hot_writer(np.array([space.n]), np.array([space.start]), (), field, batched)
    if isinstance(space, spaces.MultiDiscrete):
        return _one_hot_writer(space.nvec.reshape(-1), space.start.reshape(-1), space.nvec.shape, field, batched)
    if isinstance(space, spaces.MultiBinary):
        return _box_writer(spaces.Box(0, 1, shape=space.shape, dtype=np.int8), field, batched)
    assert isinstance(space, (spaces.Dict, spaces.Tuple))
    parts, start = [], 0
    for key, inner in parts_of(space):
        stop = start + spaces.flatdim(inner)
        parts.append((key, _space_writer(inner, f"{field}[{key!r}]", batched), slice(start, stop)))
        start = stop
    return _parts_writer(parts, Mapping if isinstance(space, spaces.Dict) else tuple, field)


def parts_of(space: spaces.Dict | spaces.Tuple[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Keys and spaces of the parts, in layout order."""
    return list(space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces))


def _box_writer(space: spaces.Box, field: str, batched: bool) -> Writer:
    shape, dtype = space.shape, space.dtype
    low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
    low, high = low - _BOUND_TOLERANCE * (1 + np.abs(low)), high + _BOUND_TOLERANCE * (1 + np.abs(high))
    full_range = dtype == np.uint8 and bool((low <= 0).all() and (high >= 255).all())
    bounded = not full_range and bool((np.isfinite(low) | np.isfinite(high)).any())

    def write(obs: Any, rows: np.ndarray) -> None:
        array = _array(obs, shape, len(rows), field, batched)
        if array.dtype != dtype and not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise Malformed(f"{field} has dtype {array.dtype}, must be {dtype}")
        flat = array.reshape(len(rows), -1)
        # NaN is outside of nothing here; the whole row is checked for it at the end.
        if bounded and (outside := (flat < low) | (flat > high)).any():
            slot, index = _first(outside)
            raise Malformed(
                f"{field} is out of its space at flat index {index}: {flat[slot, index]} not in "
                f"[{space.low.reshape(-1)[index]}, {space.high.reshape(-1)[index]}]",
                slot,
            )
        with np.errstate(over="ignore"):
            rows[:] = flat

    return write


def _one_hot_writer(counts: np.ndarray, start: np.ndarray, shape: tuple[int, ...], field: str, batched: bool) -> Writer:
    """Choices of ``counts[i]`` values from ``start[i]`` on; a one per choice."""
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def write(obs: Any, rows: np.ndarray) -> None:
        array = _array(obs, shape, len(rows), field, batched)
        # Python's bools are integers too.
        if array.dtype.kind not in "iub":
            raise Malformed(f"{field} {short(obs)} is {array.dtype}, must be integers")
        index = array.reshape(len(rows), -1) - start
        if (outside := (index < 0) | (index >= counts)).any():
            slot, choice = _first(outside)
            first, last = start[choice], start[choice] + counts[choice] - 1
            raise Malformed(f"{field} is {index[slot, choice] + first}, must be {first}..{last}", slot)
        rows[:] = 0.0
        rows[np.arange(len(rows))[:, None], offsets + index] = 1.0

    return write


def _parts_writer(
    parts: list[tuple[Any, Writer, slice]], kind: type[Mapping[Any, Any]] | type[tuple[Any, ...]], field: str
) -> Writer:
    def write(obs: Any, rows: np.ndarray) -> None:
        if not isinstance(obs, kind) or len(obs) != len(parts):
            raise Malformed(f"{field} {short(obs)} must be a {kind.__name__} of {len(parts)}")
        for key, writer, where in parts:
            try:
                part = obs[key]
            except KeyError:
                raise Malformed(f"{field} has no key {key!r}") from None
            writer(part, rows[:, where])

    return write


def _array(obs: Any, shape: tuple[int, ...], slots: int, field: str, batched: bool) -> np.ndarray:
    array = np.asarray(obs)
    expected = (slots, *shape) if batched else shape
    if array.shape != expected:
        raise Malformed(f"{field} has shape {array.shape}, must be {expected}")
    return array if batched else array[None]


def check_rewards(rewards: Any, slots: int) -> np.ndarray:
    """A batch of rewards as an array [B]; raises ``Malformed`` if one is not a finite number within the limit."""
    array = np.asarray(rewards)
    if array.shape != (slots,) or array.dtype.kind not in "iufb":
        raise Malformed(f"reward is {array.dtype} {array.shape}, must be numbers {(slots,)}")
    good = np.abs(array) <= REWARD_LIMIT
    if not good.all():
        slot = int(np.argmin(good))
        raise Malformed(f"reward {array[slot]} is not finite or beyond {REWARD_LIMIT:g}", slot)
    return array


def check_flags(flags: Any, slots: int, name: str) -> np.ndarray:
    """A batch of flags as an array [B]; raises ``Malformed`` if they are not bool."""
    array = np.asarray(flags)
    if array.shape != (slots,) or array.dtype != np.bool_:
        raise Malformed(f"{name} is {array.dtype} {array.shape}, must be bool {(slots,)}")
    return array


def check_reward(reward: Any) -> float:
    """One reward as a float; raises ``Malformed`` if it is not a finite number within the limit."""
    is_scalar = isinstance(reward, np.ndarray) and reward.shape == () and reward.dtype.kind in "iufb"
    if not is_scalar and not isinstance(reward, (int, float, np.integer, np.floating, np.bool_)):
        raise Malformed(f"reward {short(reward)} is not a number")
    number = float(reward)
    if not abs(number) <= REWARD_LIMIT:
        raise Malformed(f"reward {number} is not finite or beyond {REWARD_LIMIT:g}")
    return number


def check_flag(flag: Any, name: str) -> bool:
    """One flag as a bool; raises ``Malformed`` if it is not a bool."""
    if not isinstance(flag, (bool, np.bool_)):
        raise Malformed(f"{name} {short(flag)} is not a bool")
    return bool(flag)


def short(value: Any) -> str:
    """Type and value for a message, in at most 80 characters."""
    text = f"{type(value).__name__} {value!r}".replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."


def _first(bad: np.ndarray) -> tuple[int, int]:
    slot, index = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return int(slot), int(index)
