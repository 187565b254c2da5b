"""Write observations of gymnasium's spaces into rows of numbers, checking them against the space.

Used by every adapter of third-party environments. A writer takes the observation of one slot, or of a whole batch
whose every array has the slots as first dimension, and fills flat rows [slots, size].
"""

# B slots of a batch (1 for a single observation)

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from shoal.envs.boundary import DictSpace, EnvSpec, ImageSpace
from shoal.envs.reports import CLIPPED, CODES, OUT_OF_BOUNDS, UNDECLARED, Reports

Writer = Callable[[Any, np.ndarray], None]
"""(observation, rows [B, size]): writes the rows, or raises ``Malformed``."""

REWARD_LIMIT = 1e9
"""Largest magnitude of a valid reward: squared errors of its size leave float32 no digits for anything else."""
OBSERVATION_LIMIT = 1e9
"""Largest magnitude of a number in a row: with the largest of float32, one observation would make the memory NaN."""
_LARGEST = {"float32": OBSERVATION_LIMIT, "float16": float(np.finfo(np.float16).max)}
"""By the type of the numbers in rows."""
_LARGEST_CODE = 31
"""A picture without a brighter pixel than this may be none: MiniGrid's codes of objects and colours go up to 10."""
_LOOKED_AT = 500
"""Pictures of a slot, or of all slots of a vector environment."""
_BOUND_TOLERANCE = 1e-4
"""Relative; environments compute in float64 and clip in float32."""


class Malformed(Exception):
    """A result does not fit the environment's spaces; ``slot`` is the faulty one of a batch."""

    def __init__(self, text: str, slot: int | None = None) -> None:
        super().__init__(text)
        self.slot = slot


def make_writer(
    space: spaces.Space[Any], spec: EnvSpec, *, batched: bool, reports: Reports | None = None, field: str = "obs"
) -> Writer:
    """The writer of a space's observations into rows of the spec's shape and dtype, each flat, and of vectors and
    Dicts also into numbers, float32 [B, size].

    It takes every type of number that says the same as the declared one, and counts in ``reports`` what leaves the
    declared bounds or is clipped.

    Args:
        space: One slot's observation space.
        spec: Made from it by ``envs.spaces.make_spec``, which refuses spaces that have no writer.
        batched: Whether observations come for all slots at once, as a gymnasium vector environment gives them.
        reports: Takes the remarks.
        field: What observations are called in remarks and errors.
    """
    reports = Reports() if reports is None else reports
    if isinstance(spec.observation, ImageSpace):
        assert isinstance(space, spaces.Box)
        return _box_writer(space, field, batched, reports, spec.observation.axes)
    if spec.byte_parts or isinstance(space, (spaces.Dict, spaces.Tuple)):
        return _space_writer(space, field, batched, reports, places_of(space, spec))
    return _leaf_writer(space, field, batched, reports, None)


class Place(NamedTuple):
    """Where an innermost part of an observation is in rows."""

    numbers: slice
    """Its columns in rows of float32."""
    bytes: slice | None
    """Its columns in rows of bytes; None where rows are none."""
    dtype: np.dtype
    """Of its numbers in rows of bytes."""
    axes: tuple[int, ...] | None
    """The order in which rows have an image's axes; None: it is no image."""

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Its numbers in rows [B, size] of either kind, as a view."""
        if self.bytes is None or rows.dtype != np.uint8:
            return rows[:, self.numbers]
        return rows[:, self.bytes].view(self.dtype)


def places_of(space: spaces.Space[Any], spec: EnvSpec) -> Iterator[Place]:
    """The places of all innermost parts, in layout order."""
    observation, parts = spec.observation, spec.byte_parts
    images: dict[int, ImageSpace] = {}
    if isinstance(observation, DictSpace):
        images = {leaf: image for leaf, (_, image) in zip(observation.leaves, observation.images, strict=True)}
    wide = np.dtype(np.float32)
    dtype = parts[0][1] if parts else wide
    number = byte = 0
    picture = observation.numbers.size if isinstance(observation, DictSpace) else 0
    picture_byte = picture * wide.itemsize
    for index, (_, inner) in enumerate(leaves_of(space)):
        size = spaces.flatdim(inner)
        if index in images:
            kind = np.dtype(images[index].dtype)
            stop = picture_byte + size * kind.itemsize
            yield Place(
                slice(picture, picture + size), slice(picture_byte, stop) if parts else None, kind, images[index].axes
            )
            picture, picture_byte = picture + size, stop
        else:
            stop = byte + size * dtype.itemsize
            yield Place(slice(number, number + size), slice(byte, stop) if parts else None, dtype, None)
            number, byte = number + size, stop


def _space_writer(
    space: spaces.Space[Any],
    field: str,
    batched: bool,
    reports: Reports,
    places: Iterator[Place],
) -> Writer:
    """Like ``gymnasium.spaces.flatten``, but checking, and into rows that exist."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [
            (key, _space_writer(inner, f"{field}[{key!r}]", batched, reports, places)) for key, inner in parts_of(space)
        ]
        return _parts_writer(parts, Mapping if isinstance(space, spaces.Dict) else Sequence, field, reports)
    place = next(places)
    write = _leaf_writer(space, field, batched, reports, place.axes)
    return lambda obs, rows: write(obs, place.of(rows))


def _leaf_writer(
    space: spaces.Space[Any], field: str, batched: bool, reports: Reports, axes: tuple[int, ...] | None
) -> Writer:
    if isinstance(space, spaces.Box):
        return _box_writer(space, field, batched, reports, axes)
    if isinstance(space, spaces.Discrete):
        return _one_hot_writer(np.array([space.n]), np.array([space.start]), (), field, batched)
    if isinstance(space, spaces.MultiDiscrete):
        return _one_hot_writer(space.nvec.reshape(-1), space.start.reshape(-1), space.nvec.shape, field, batched)
    assert isinstance(space, spaces.MultiBinary)
    return _box_writer(spaces.Box(0, 1, shape=space.shape, dtype=np.int8), field, batched, reports)


def parts_of(space: spaces.Dict | spaces.Tuple[Any]) -> list[tuple[Any, spaces.Space[Any]]]:
    """Keys and spaces of the parts, in layout order."""
    return list(space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces))


def leaves_of(
    space: spaces.Space[Any], keys: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    """(keys, space) of the innermost parts, in layout order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, inner in parts_of(space):
            yield from leaves_of(inner, (*keys, key))
    else:
        yield keys, space


def _box_writer(
    space: spaces.Box, field: str, batched: bool, reports: Reports, axes: tuple[int, ...] | None = None
) -> Writer:
    """``axes``: the order in which rows have the box's axes; None is its own."""
    shape, dtype = space.shape, space.dtype
    low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
    low, high = low - _BOUND_TOLERANCE * (1 + np.abs(low)), high + _BOUND_TOLERANCE * (1 + np.abs(high))
    has_all_bytes = dtype == np.uint8 and bool((low <= 0).all() and (high >= 255).all())
    bounded = bool((np.isfinite(low) | np.isfinite(high)).any())
    moved = axes is not None and axes != tuple(range(len(shape)))
    looks_like_codes = _code_watch(field, reports) if axes is not None and has_all_bytes else None

    def write(obs: Any, rows: np.ndarray) -> None:
        array = _array(obs, shape, len(rows), field, batched)
        if array.dtype.kind not in "iufb":
            raise Malformed(f"{field} has dtype {array.dtype}, must be {dtype}")
        flat = array.reshape(len(rows), -1)
        if array.dtype != np.uint8 or not has_all_bytes:
            if np.issubdtype(dtype, np.integer):
                _check_whole(flat, dtype, field)
            elif rows.dtype.kind in "iu":
                _check_whole(flat, rows.dtype, field)
            if rows.dtype.kind == "f":
                flat = _limited(flat, field, reports, _LARGEST[rows.dtype.name])
            if bounded and (outside := (flat < low) | (flat > high)).any():
                slot, index = _first(outside)
                reports.remark(
                    OUT_OF_BOUNDS,
                    int(outside.any(1).sum()),
                    f"{field} is out of its space at flat index {index}: {flat[slot, index]} not in "
                    f"[{space.low.reshape(-1)[index]}, {space.high.reshape(-1)[index]}]",
                )
        if moved:
            assert axes is not None
            there = rows.reshape(len(rows), *(shape[axis] for axis in axes))
            there[:] = flat.reshape(len(rows), *shape).transpose(0, *(axis + 1 for axis in axes))
        else:
            rows[:] = flat
        nonlocal looks_like_codes
        if looks_like_codes and looks_like_codes(flat):
            looks_like_codes = None

    return write


def _code_watch(field: str, reports: Reports) -> Callable[[np.ndarray], bool]:
    """Remarks once if the first ``_LOOKED_AT`` pictures are so dark that their numbers may be codes.

    The function takes pictures [B, size] and returns True when it has seen enough.
    """
    largest = seen = 0

    def look(flat: np.ndarray) -> bool:
        nonlocal largest, seen
        largest, seen = max(largest, int(flat.max())), seen + len(flat)
        if largest > _LARGEST_CODE:
            return True
        if seen < _LOOKED_AT or not largest:
            return False
        reports.remark(
            CODES,
            1,
            f"{field} is read as a picture with shades up to 255, but in {seen} of them no number was above {largest}: "
            "if these are codes, env.image_layout=none reads each number by itself",
        )
        return True

    return look


def _check_whole(flat: np.ndarray, dtype: np.dtype, field: str) -> None:
    """Raise ``Malformed`` if an integer ``dtype`` cannot hold a number as it is: a cast would make another of it."""
    if np.can_cast(flat.dtype, dtype):
        return
    limits = np.iinfo(dtype)
    wrong = ~((flat >= limits.min) & (flat <= limits.max))
    if flat.dtype.kind == "f":
        wrong |= flat != np.floor(flat)
    if wrong.any():
        slot, index = _first(wrong)
        raise Malformed(
            f"{field} is {flat[slot, index]} ({flat.dtype}) at flat index {index}, must be a whole number from "
            f"{limits.min} to {limits.max}",
            slot,
        )


def _limited(flat: np.ndarray, field: str, reports: Reports, limit: float) -> np.ndarray:
    """Numbers within ``limit``; raises ``Malformed`` if one is not finite."""
    flat = _wide(flat)
    good = (flat <= limit) & (flat >= -limit)
    if good.all():
        return flat
    finite = np.isfinite(flat)
    if not finite.all():
        slot, index = _first(~finite)
        raise Malformed(f"{field} has a value that is not finite, {flat[slot, index]}, at flat index {index}", slot)
    slot, index = _first(~good)
    reports.remark(
        CLIPPED,
        int((~good).any(1).sum()),
        f"{field} is {flat[slot, index]:g} at flat index {index}, clipped to {limit:g}",
    )
    return np.clip(flat, -limit, limit)


def _one_hot_writer(counts: np.ndarray, start: np.ndarray, shape: tuple[int, ...], field: str, batched: bool) -> Writer:
    """Choices of ``counts[i]`` values from ``start[i]`` on; a one per choice."""
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def write(obs: Any, rows: np.ndarray) -> None:
        array = _array(obs, shape, len(rows), field, batched)
        if array.dtype.kind not in "iufb" or (array.dtype.kind == "f" and (array != np.floor(array)).any()):
            raise Malformed(f"{field} {short(obs)} is {array.dtype}, must be integers")
        index = array.reshape(len(rows), -1).astype(np.int64) - start
        if (outside := (index < 0) | (index >= counts)).any():
            slot, choice = _first(outside)
            first, last = start[choice], start[choice] + counts[choice] - 1
            raise Malformed(f"{field} is {index[slot, choice] + first}, must be {first}..{last}", slot)
        rows[:] = 0.0
        rows[np.arange(len(rows))[:, None], offsets + index] = 1.0

    return write


def _parts_writer(
    parts: list[tuple[Any, Writer]], kind: type[Mapping[Any, Any]] | type[Sequence[Any]], field: str, reports: Reports
) -> Writer:
    def write(obs: Any, rows: np.ndarray) -> None:
        if not isinstance(obs, kind) or len(obs) < len(parts) or (kind is Sequence and len(obs) > len(parts)):
            raise Malformed(f"{field} {short(obs)} must be a {kind.__name__} of {len(parts)}{_keys(parts, kind)}")
        if len(obs) > len(parts):
            declared = {key for key, _ in parts}
            more = sorted(str(key) for key in obs if key not in declared)
            reports.remark(UNDECLARED, 1, f"{field} has {', '.join(more)}, which its space has not: left out")
        for key, writer in parts:
            try:
                part = obs[key]
            except KeyError:
                raise Malformed(f"{field} has no key {key!r}") from None
            writer(part, rows)

    return write


def _keys(parts: list[tuple[Any, Writer]], kind: type) -> str:
    return f": {', '.join(str(key) for key, _ in parts)}" if kind is Mapping else ""


def _array(obs: Any, shape: tuple[int, ...], slots: int, field: str, batched: bool) -> np.ndarray:
    """[slots, *shape]; an axis of length 1 too many or too few says nothing else."""
    array = np.asarray(obs)
    if array.dtype == object:
        raise Malformed(f"{field} is {short(obs)}, must be numbers of shape {shape}")
    expected = (slots, *shape) if batched else shape
    if array.shape != expected and (not _alike(array.shape, expected) or (batched and array.shape[:1] != (slots,))):
        raise Malformed(f"{field} has shape {array.shape}, must be {expected}")
    return array.reshape(slots, *shape)


def _alike(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return [side for side in shape if side != 1] == [side for side in expected if side != 1]


def check_rewards(rewards: Any, slots: int) -> np.ndarray:
    """A batch of rewards, [B] or [B, 1], as an array [B]; raises ``Malformed`` if one is not a finite number within the
    limit."""
    try:
        array = _batch(rewards, slots, "reward", "numbers")
    except Malformed as error:
        raise _advised(error, rewards, (slots,)) from None
    good = (array <= REWARD_LIMIT) & (array >= -REWARD_LIMIT)
    if not good.all():
        slot = int(np.argmin(good))
        raise Malformed(f"reward {array[slot]} is not finite or beyond {REWARD_LIMIT:g}", slot)
    return array


def _advised(error: Malformed, reward: Any, batch: tuple[int, ...]) -> Malformed:
    """The error, with advice where it is about a reward of several numbers."""
    shape = np.shape(reward)
    if shape[: len(batch)] != batch or len(shape) == len(batch):
        return error
    return Malformed(
        f"{error}: a policy is trained with one number; a wrapper makes one of several, such as "
        "mo_gymnasium.wrappers:LinearReward in env.wrappers",
        error.slot,
    )


def check_flags(flags: Any, slots: int, name: str) -> np.ndarray:
    """A batch of flags, [B] or [B, 1], as bool [B]; raises ``Malformed`` if one is neither true nor false, 1 nor 0."""
    array = _batch(flags, slots, name, "bool")
    if array.dtype == np.bool_:
        return array
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        slot = int(np.argmax(wrong))
        raise Malformed(f"{name} is {array[slot]}, must be a bool", slot)
    return array.astype(np.bool_)


def check_reward(reward: Any) -> float:
    """One reward as a float; raises ``Malformed`` if it is not a finite number within the limit."""
    try:
        number = _single(reward, "reward", "a number")
    except Malformed as error:
        raise _advised(error, reward, ()) from None
    if not abs(number) <= REWARD_LIMIT:
        raise Malformed(f"reward {number} is not finite or beyond {REWARD_LIMIT:g}")
    return number


def check_flag(flag: Any, name: str) -> bool:
    """One flag as a bool; raises ``Malformed`` if it is neither true nor false, 1 nor 0."""
    if isinstance(flag, bool):
        return flag
    number = _single(flag, name, "a bool")
    if number not in (0.0, 1.0):
        raise Malformed(f"{name} {short(flag)} is not a bool")
    return bool(number)


def _batch(values: Any, slots: int, name: str, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape == (slots, 1):
        array = array[:, 0]
    if array.shape != (slots,) or array.dtype.kind not in "iufb":
        raise Malformed(f"{name} is {array.dtype} {array.shape}, must be {what} {(slots,)}")
    return _wide(array)


def _wide(array: np.ndarray) -> np.ndarray:
    """Half precision has no number as large as the limits."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _single(value: Any, name: str, what: str) -> float:
    """One number, also in an array of one."""
    if isinstance(value, (int, float)):
        return float(value)
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iufb":
        raise Malformed(f"{name} {short(value)} is not {what}")
    return float(array.reshape(()))


def short(value: Any) -> str:
    """Type and value for a message, in at most 80 characters."""
    text = f"{type(value).__name__} {value!r}".replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."


def _first(bad: np.ndarray) -> tuple[int, int]:
    slot, index = np.unravel_index(int(np.argmax(bad)), bad.shape)
    return int(slot), int(index)
