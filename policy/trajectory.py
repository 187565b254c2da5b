"""The trajectory format: one unroll as an actor ships it to a learner, on the wire, in the object store and on disk.

One Arrow record batch per unroll, a row per environment slot, fixed-shape-tensor columns. Network rows (``obs``,
``is_first``) are T+1: row T is not acted on here; it bootstraps this unroll and is row 0 of the next. Environment rows
are T. Transition t is a *reset transition (masked)* if ``is_first[t + 1]`` is set but neither ``terminated[t]`` nor
``truncated[t]`` is: it only leads from one episode to the next, so no loss, step count or average includes it. If an
episode ends with ``is_first`` in the same step, its last observation is ``final_obs[t]``; otherwise it is row t+1
(``envs.boundary`` explains both forms). Where the environment says which actions are legal, the network rows also have
``action_mask``.

``is_first`` is the first row of an episode. There the memory is zeroed as well, unless it is carried across episodes
(``actor.reset_memory``): then the network rows also have ``memory_reset``, which says where it is zeroed, and all else
goes by ``is_first``, ``terminated`` and ``truncated`` as before.
"""

# T time, B rows (slots), C burn-in rows, P actions of a mask

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

FORMAT_VERSION = 4
FAST_STATE = (("h", (2, 128)), ("c", (2, 128)))
"""``TrajectorySpec.state_shapes`` of ``FastPolicy`` with the LSTM."""
_SCALAR_COLUMNS = ("training_env_id",)


class TrajectoryError(ValueError):
    """The bytes are not a trajectory of this run; the message says what was expected and what arrived."""


@dataclasses.dataclass(frozen=True, slots=True)
class TrajectorySpec:
    """Shapes and types of one unroll of one actor; both sides derive it from the same environment and config."""

    unroll_length: int
    """T."""
    obs_shape: tuple[int, ...]
    obs_dtype: str
    action_shape: tuple[int, ...]
    action_dtype: str
    state_shapes: tuple[tuple[str, tuple[int, ...]], ...] = FAST_STATE
    """Names and shapes of the tensors of a slot's state (``Core.state_shapes``)."""
    num_actions: tuple[int, ...] = ()
    """Number of actions of each discrete choice; empty where actions are continuous."""
    same_step: bool = False
    """Episodes end in the same-step form of ``envs.boundary``, so there is a column ``final_obs``."""
    burn_in: int = 0
    """C: rows before row 0 that are shipped as well, with the state before the first of them. ``burn_in_is_first`` says
    where the memory is zeroed in them."""
    num_mask: int = 0
    """P: actions that masks of legal actions tell of, all choices together; 0 where there are no masks."""
    carries_memory: bool = False
    """The memory is carried across episodes, so there is a column ``memory_reset``."""
    float_spans: tuple[tuple[int, int, str], ...] = ()
    """(start, stop, type) of the floating-point numbers in observations that are rows of bytes."""

    def columns(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape of one row, dtype) by column. Flags are uint8 0 or 1: Arrow's booleans are bits, which cost a copy."""
        t, c = self.unroll_length, self.burn_in
        f32, u8 = np.dtype(np.float32), np.dtype(np.uint8)
        obs = np.dtype(self.obs_dtype)
        columns: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "training_env_id": ((), np.dtype(np.int64)),
            "obs": ((t + 1, *self.obs_shape), obs),
            "is_first": ((t + 1,), u8),
            "action": ((t, *self.action_shape), np.dtype(self.action_dtype)),
            "behavior_log_prob": ((t,), f32),
            "reward": ((t,), f32),
            "terminated": ((t,), u8),
            "truncated": ((t,), u8),
            **{f"initial_{name}": (shape, f32) for name, shape in self.state_shapes},
        }
        if self.same_step:
            columns["final_obs"] = ((t, *self.obs_shape), obs)
        if self.num_mask:
            columns["action_mask"] = ((t + 1, self.num_mask), u8)
        if self.carries_memory:
            columns["memory_reset"] = ((t + 1,), u8)
        if c:
            columns |= {
                "burn_in_obs": ((c, *self.obs_shape), obs),
                "burn_in_is_first": ((c,), u8),
                **{f"burn_in_{name}": (shape, f32) for name, shape in self.state_shapes},
            }
        return columns

    def num_bytes(self, num_slots: int) -> int:
        """Bytes of all columns of one unroll."""
        return num_slots * sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.columns().values())

    def longest_column(self) -> int:
        """The most numbers that one slot has in a column."""
        return max(math.prod(shape) for shape, _ in self.columns().values())

    def schema(self) -> pa.Schema:
        """The Arrow schema without metadata; not nullable."""
        return _schema(self)

    def spaces_hash(self) -> str:
        """Hash of all fields, by which batches of another shape or type are recognised before they are read."""
        return _spaces_hash(self)


@functools.cache
def _spaces_hash(spec: TrajectorySpec) -> str:
    fields = dataclasses.asdict(spec)
    if not spec.float_spans:  # without them it is the hash that it was before there were any
        del fields["float_spans"]
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


@functools.cache
def _schema(spec: TrajectorySpec) -> pa.Schema:
    fields = []
    for name, (shape, dtype) in spec.columns().items():
        value = pa.from_numpy_dtype(dtype)
        fields.append(pa.field(name, pa.fixed_shape_tensor(value, shape) if shape else value, nullable=False))
    return pa.schema(fields)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryHeader:
    """Origin of one unroll: run, actor, sequence number and policy version; shipped as schema metadata."""

    run_id: str
    actor: int
    restart_index: int
    """Number of times that this actor was replaced before."""
    sequence: int
    """Number of this unroll within (actor, restart index), from 0."""
    policy_version: int
    """Version of the weights that acted."""
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain numbers for metrics: finished episodes, seconds by stage, faults."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trajectory:
    """One unroll as read: numpy views into the received bytes, each [B, ...] as ``TrajectorySpec.columns`` says."""

    header: TrajectoryHeader
    columns: Mapping[str, np.ndarray]
    num_bytes: int

    @property
    def num_slots(self) -> int:
        """B."""
        return len(self.columns["training_env_id"])

    @property
    def env_steps(self) -> int:
        """Number of transitions, reset transitions (masked) excluded."""
        return count_valid(self.columns)


def count_valid(columns: Mapping[str, np.ndarray]) -> int:
    """Number of transitions, reset transitions (masked) excluded."""
    ended = columns["terminated"] | columns["truncated"]
    masked = columns["is_first"][:, 1:] > ended
    return int(masked.size - np.count_nonzero(masked))


def allocate(spec: TrajectorySpec, num_slots: int) -> dict[str, np.ndarray]:
    """Empty columns for one unroll, [B, ...] each. Unwritten values are recognisable: NaN, -1, 255.

    ``final_obs`` starts as zeros, because only rows where an episode ended are ever written.
    """
    columns = {}
    for name, (shape, dtype) in spec.columns().items():
        unwritten = 0 if name == "final_obs" else np.nan if dtype.kind == "f" else -1 if dtype.kind == "i" else 255
        columns[name] = np.full((num_slots, *shape), unwritten, dtype)
    return columns


def to_bytes(spec: TrajectorySpec, header: TrajectoryHeader, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """One Arrow IPC stream with one record batch, as uint8 [num_bytes]; the columns are copied once, into it."""
    arrays = [_arrow(columns[name]) for name in spec.columns()]
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "run_id": header.run_id,
        "actor": str(header.actor),
        "restart_index": str(header.restart_index),
        "sequence": str(header.sequence),
        "policy_version": str(header.policy_version),
        "spaces_hash": spec.spaces_hash(),
        "statistics": json.dumps(header.statistics),
    }
    # Reserves the checksum's place; nothing else in the bytes can equal it.
    placeholder = xxhash.xxh3_64_hexdigest(json.dumps(metadata).encode())
    metadata["checksum"] = placeholder
    batch = pa.RecordBatch.from_arrays(arrays, schema=spec.schema().with_metadata(metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    payload = np.frombuffer(sink.getvalue(), np.uint8)
    place = _find(payload[: batch.schema.serialize().size], placeholder)
    payload[place] = np.frombuffer(_checksum(payload, place).encode(), np.uint8)
    return payload


def _arrow(column: np.ndarray) -> pa.Array:
    """A column [B, ...] as an Arrow array over the same memory.

    ``pyarrow.array`` and ``FixedShapeTensorArray.from_numpy_ndarray`` make the same, but import pandas where it is
    installed: a second of every actor's start.
    """
    values = np.ascontiguousarray(column)
    array = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])
    if values.ndim == 1:
        return array
    kind = pa.fixed_shape_tensor(array.type, values.shape[1:])
    rows = pa.FixedSizeListArray.from_arrays(array, math.prod(values.shape[1:]))
    return pa.ExtensionArray.from_storage(kind, rows)


def from_bytes(
    spec: TrajectorySpec, payload: np.ndarray | bytes | pa.Buffer, *, run_id: str | None = None, max_slots: int = 2**16
) -> Trajectory:
    """Read and check one unroll; the columns are views into ``payload``.

    If ``run_id`` is given, batches of other runs raise. No later check stands between damaged bytes and training.

    Raises:
        TrajectoryError: the bytes are not one record batch of this schema, it has too many rows, the checksum differs,
            or a value is out of range.
    """
    buffer = payload if isinstance(payload, pa.Buffer) else pa.py_buffer(payload)
    source = pa.BufferReader(buffer)
    try:
        with pa.ipc.open_stream(source) as reader:
            metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            _check_identity(spec, metadata, reader.schema, run_id)
            _check_checksum(np.frombuffer(buffer, np.uint8), source.tell(), metadata["checksum"])
            batch = reader.read_next_batch()
            batch.validate(full=True)
            if next(reader, None) is not None or source.tell() != buffer.size:
                raise TrajectoryError("there is more than one record batch")
    except (pa.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
        raise TrajectoryError(f"not an Arrow stream with one trajectory batch: {error!r}") from error
    if not 0 < batch.num_rows <= max_slots:
        raise TrajectoryError(f"expected 1..{max_slots} slots, got {batch.num_rows}")
    columns = {}
    begin, end = buffer.address, buffer.address + buffer.size
    for index, (name, (shape, dtype)) in enumerate(spec.columns().items()):
        # Null bitmaps come first: a tensor has one for its rows and one for its values; Arrow omits empty ones.
        *nulls, values = batch.column(index).buffers()
        if any(bitmap is not None for bitmap in nulls):
            raise TrajectoryError(f"column {name} has nulls")
        if not begin <= values.address <= values.address + values.size <= end:
            raise TrajectoryError(f"column {name} is compressed; trajectories are read where they lie")
        count = batch.num_rows * math.prod(shape)
        columns[name] = np.frombuffer(values, dtype, count).reshape(batch.num_rows, *shape)
    _check_values(spec, columns)
    return Trajectory(_header(metadata), columns, buffer.size)


def _header(metadata: Mapping[str, str]) -> TrajectoryHeader:
    try:
        numbers = {name: int(metadata[name]) for name in ("actor", "restart_index", "sequence", "policy_version")}
        statistics = json.loads(metadata["statistics"])
    except (ValueError, RecursionError) as error:
        raise TrajectoryError(f"metadata that cannot be read: {error}") from error
    if not all(map(_is_count, numbers.values())) or not isinstance(statistics, dict):
        raise TrajectoryError(f"expected numbers from 0 and a JSON object of statistics, got {numbers}, {statistics!r}")
    for name, value in statistics.items():
        if name in _REPORTED and not _REPORTED[name](value):
            raise TrajectoryError(f"statistics that no actor reports: {name} is {reprlib.repr(value)}")
    return TrajectoryHeader(run_id=metadata["run_id"], statistics=statistics, **numbers)


def _is_number(value: Any) -> bool:
    # Sums of many must be finite, too.
    return type(value) in (int, float) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


def _mapping_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_one, value.values()))


def _pair_of(*are: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(are)
        and all(is_one(part) for is_one, part in zip(are, value, strict=True))
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_REPORTED: Mapping[str, Callable[[Any], bool]] = {
    "policy_seconds": _is_seconds,
    "env_seconds": _is_seconds,
    "pack_seconds": _is_seconds,
    "env_steps": _is_count,
    "episode_returns": _list_of(_is_number),
    "episode_lengths": _list_of(_is_count),
    "faults": _list_of(_is_text),
    "episode_metrics": _mapping_of(_list_of(_is_number)),
    "remarks": _mapping_of(_pair_of(_is_count, _is_text)),
    "ignored_tokens": _is_count,
    "games": _list_of(_pair_of(_is_count, _is_number)),
    "opponent_env_steps": _is_count,
}
"""What each of an actor's statistics must be. Metrics, the ledger's episodes and self-play take them in unseen."""

_METADATA_KEYS = frozenset(
    (
        "format_version",
        "run_id",
        "actor",
        "restart_index",
        "sequence",
        "policy_version",
        "spaces_hash",
        "statistics",
        "checksum",
    )
)


def _check_identity(spec: TrajectorySpec, metadata: Mapping[str, str], schema: pa.Schema, run_id: str | None) -> None:
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise TrajectoryError(f"expected format version {FORMAT_VERSION}, got {metadata.get('format_version')}")
    if metadata.keys() != _METADATA_KEYS:
        raise TrajectoryError(f"expected metadata {sorted(_METADATA_KEYS)}, got {sorted(metadata)}")
    if run_id is not None and metadata["run_id"] != run_id:
        raise TrajectoryError(f"batch of run {metadata['run_id']}, this is run {run_id}")
    if metadata["spaces_hash"] != spec.spaces_hash() or not schema.remove_metadata().equals(spec.schema()):
        raise TrajectoryError(f"expected columns {spec.schema()}, got {schema.remove_metadata()}")


def _check_values(spec: TrajectorySpec, columns: Mapping[str, np.ndarray]) -> None:
    limits = np.array(spec.num_actions if spec.action_shape else spec.num_actions[:1])
    if len(limits) and ((columns["action"] < 0) | (columns["action"] >= limits)).any():
        raise TrajectoryError(f"column action must hold indices of {spec.num_actions} actions")
    for name in ("is_first", "terminated", "truncated", "memory_reset", "burn_in_is_first", "action_mask"):
        if name in columns and columns[name].max() > 1:
            raise TrajectoryError(f"column {name} must hold 0 or 1, got {columns[name].max()}")
    _check_ends(spec, columns)
    if spec.carries_memory and (wrong := columns["memory_reset"] > columns["is_first"]).any():
        slot, t = np.argwhere(wrong)[0]
        raise TrajectoryError(f"slot {slot}, row {t}: the memory is zeroed where no episode begins")
    if spec.num_mask:
        _check_legal(spec, columns)
    for name, column in columns.items():
        for numbers in _floats(spec, name, column):
            if not (finite := np.isfinite(numbers)).all():
                raise TrajectoryError(f"column {name} has {np.count_nonzero(~finite)} non-finite numbers")


def _floats(spec: TrajectorySpec, name: str, column: np.ndarray) -> list[np.ndarray]:
    """The floating-point numbers of a column."""
    if spec.float_spans and name in ("obs", "final_obs", "burn_in_obs"):
        return [column[..., start:stop].view(dtype) for start, stop, dtype in spec.float_spans]
    return [column] if column.dtype.kind == "f" else []


def _check_ends(spec: TrajectorySpec, columns: Mapping[str, np.ndarray]) -> None:
    """An end without its reset would train one episode with another's memory."""
    ended, is_first = columns["terminated"] | columns["truncated"], columns["is_first"]
    if spec.same_step:
        wrong, where = ended > is_first[:, 1:], "in the same step"
    else:
        wrong, where = ended & is_first[:, 1:], "in the next step, not in the same"
        wrong[:, :-1] |= ended[:, :-1] > is_first[:, 2:]
    if wrong.any():
        slot, t = np.argwhere(wrong)[0]
        raise TrajectoryError(f"slot {slot}, transition {t}: an episode that ends must be followed by a reset {where}")


def _check_legal(spec: TrajectorySpec, columns: Mapping[str, np.ndarray]) -> None:
    """An action that was not legal has no log-probability."""
    mask, action = columns["action_mask"][:, :-1], columns["action"]
    chosen = action if spec.action_shape else action[..., None]
    offsets = np.concatenate([[0], np.cumsum(spec.num_actions)[:-1]])
    if spec.num_mask != sum(spec.num_actions) or not np.take_along_axis(mask, chosen + offsets, -1).all():
        raise TrajectoryError("column action must hold legal actions, as column action_mask tells them")


def _check_checksum(payload: np.ndarray, schema_bytes: int, checksum: str) -> None:
    """Compare the checksum before Arrow reads the batch, so that Arrow never parses damaged bytes."""
    place = _find(payload[:schema_bytes], checksum)
    if checksum != _checksum(payload, place):
        raise TrajectoryError(f"checksum {checksum} does not match the data: the bytes changed on their way")


def _find(schema: np.ndarray, checksum: str) -> slice:
    begin = schema.tobytes().find(checksum.encode())
    return slice(begin, begin + len(checksum))


def _checksum(payload: np.ndarray, place: slice) -> str:
    """xxh3-64 of every byte, padding included, except the checksum's own ``place``."""
    digest = xxhash.xxh3_64(payload[: place.start].data)
    digest.update(payload[place.stop :].data)
    return digest.hexdigest()
