"""The trajectory reader, and what takes its trajectories in: forged columns, metadata, Arrow and bytes."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from hypothesis import strategies as st
from rollouts import RUN, random_columns
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics, report_trajectories
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import (
    Trajectory,
    TrajectoryError,
    TrajectoryHeader,
    TrajectorySpec,
    from_bytes,
    to_bytes,
)

from attacks import Attack
from attacks.edits import byte_edits, edited, numbers, texts, tree_edited, tree_edits

NUM_ENVS = 4
MARK = "?" * 16
SHAPES = (("h", (2, 3)), ("c", (2, 3)))
SPECS = (
    TrajectorySpec(5, (4, 3), "uint8", (), "int64", SHAPES, num_actions=(5,)),
    TrajectorySpec(3, (2,), "float32", (2,), "float32", SHAPES),
    TrajectorySpec(5, (2,), "float32", (), "int64", SHAPES, num_actions=(3,), same_step=True),
    TrajectorySpec(4, (2,), "float32", (2,), "int64", SHAPES, num_actions=(2, 3), num_mask=5, burn_in=2),
    TrajectorySpec(4, (2,), "float32", (), "int64", SHAPES, num_actions=(3,), carries_memory=True),
)
STATISTICS = {
    "policy_seconds": 0.5,
    "env_seconds": 0.25,
    "pack_seconds": 0.01,
    "env_steps": 20,
    "episode_returns": [0.5, 1.0],
    "episode_lengths": [7, 9],
    "faults": ["environment recall, slot 1: it raised"],
    "episode_metrics": {"score": [1.0, 2.0]},
    "remarks": {"clipped": [2, "numbers beyond 1e9 were clipped"]},
    "ignored_tokens": 0,
    "games": [[3, 1.0]],
    "opponent_env_steps": 4,
}
METADATA = (
    *("format_version", "run_id", "actor", "restart_index", "sequence", "policy_version"),
    *("spaces_hash", "statistics", "checksum", "other"),
)
_INDEX = st.integers(0, 20)
_column_edits = st.lists(
    st.one_of(
        st.tuples(st.just("value"), _INDEX, st.integers(0, 500), numbers),
        st.tuples(st.just("type"), _INDEX, st.sampled_from(("int8", "uint16", "int64", "float16", "float64", "bool"))),
        st.tuples(st.just("drop"), _INDEX),
        st.tuples(st.just("swap"), _INDEX, _INDEX),
        st.tuples(st.just("rename"), _INDEX, texts),
        st.tuples(st.just("shape"), _INDEX, st.sampled_from(("flat", "longer", "deeper"))),
        st.tuples(st.just("nulls"), _INDEX),
        st.tuples(st.just("dictionary"), _INDEX),
    ).map(list),
    max_size=3,
)


class Trajectories:
    """Bytes that an actor delivers."""

    attacks = st.fixed_dictionaries(
        {"spec": st.integers(0, len(SPECS) - 1)},
        optional={
            "columns": _column_edits,
            "metadata": st.dictionaries(st.sampled_from(METADATA), st.none() | texts | numbers.map(str), max_size=2),
            "statistics": tree_edits,
            "compression": st.sampled_from(("lz4", "zstd")),
            "batches": st.sampled_from((0, 2, 50)),
            "rows": st.sampled_from((0, 1, 3, 5, 4000)),
            "file": st.just(True),
            "bytes": byte_edits,
            "unsealed": st.just(True),
            "junk": st.binary(max_size=200).map(bytes.hex),
        },
    )

    def __init__(self) -> None:
        self._columns = [_legal(spec) for spec in SPECS]

    def attempt(self, attack: Attack) -> str:
        """Read what the attack makes, and put what is taken through the queue into the run's statistics."""
        spec = SPECS[attack["spec"]]
        try:
            payload = self._forged(spec, attack)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
            return "not made"
        try:
            trajectory = from_bytes(spec, payload, run_id=RUN)
        except TrajectoryError:
            self._delivered(spec, payload, taken=False)
            return "refused"
        check(spec, trajectory, payload)
        return self._delivered(spec, payload, taken=None)

    def _forged(self, spec: TrajectorySpec, attack: Attack) -> bytes:
        if "junk" in attack:
            return bytes.fromhex(attack["junk"])
        columns = self._columns[attack["spec"]]
        arrays, nullable = _arrays(columns, attack.get("columns", ()))
        statistics = tree_edited(STATISTICS, attack.get("statistics", ()))
        header = TrajectoryHeader(run_id=RUN, actor=0, restart_index=0, sequence=0, policy_version=3)
        known = pa.ipc.open_stream(to_bytes(spec, header, columns)).schema.metadata
        metadata: dict[str, Any] = {key.decode(): value.decode() for key, value in known.items()}
        metadata |= {"statistics": json.dumps(statistics), "checksum": MARK} | attack.get("metadata", {})
        metadata = {key: value.encode("utf-8", "surrogatepass") for key, value in metadata.items() if value is not None}
        fields = [pa.field(name, array.type, nullable=name in nullable) for name, array in arrays]
        schema = pa.schema(fields, metadata)
        batch = pa.RecordBatch.from_arrays([array for _, array in arrays], schema=schema)
        rows = attack.get("rows", NUM_ENVS)
        if rows > NUM_ENVS:
            table = pa.Table.from_batches([batch] * -(-rows // NUM_ENVS)).combine_chunks()
            [batch] = table.to_batches()
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=attack.get("compression"))
        make = pa.ipc.new_file if attack.get("file") else pa.ipc.new_stream
        with make(sink, schema, options=options) as writer:
            for _ in range(attack.get("batches", 1)):
                writer.write_batch(batch.slice(0, rows))
        data = edited(sink.getvalue().to_pybytes(), attack.get("bytes", ()))
        return data if attack.get("unsealed") else _sealed(data)

    def _delivered(self, spec: TrajectorySpec, payload: bytes, *, taken: bool | None) -> str:
        """What a queue makes of it; the next good delivery is taken all the same."""
        ledger = Ledger()
        queue = TrajectoryQueue(
            spec, run_id=RUN, num_actors=1, num_envs=NUM_ENVS, batch_size=NUM_ENVS, max_policy_lag=4, ledger=ledger
        )
        statistics = RunStatistics(ledger)
        queue.publish(3, "weights")
        header = TrajectoryHeader(
            run_id=RUN, actor=0, restart_index=1, sequence=0, policy_version=3, statistics=STATISTICS
        )
        good = to_bytes(spec, header, self._columns[SPECS.index(spec)])
        answers = []
        for data in (np.frombuffer(payload, np.uint8), good):
            assert queue.admit([0]) is not None
            answers.append(queue.deliver(0, data))
            assert queue.imbalance() == 0
            if answers[-1] is None:
                batch = queue.next_batch(None, threading.Event())
                assert batch is not None
                queue.book(batch, trained=sum(each.env_steps for each in batch))
                statistics.add_reports(report_trajectories(batch, 3))
                queue.publish(4, "weights")
        assert answers[1] is None, f"a good delivery after it was refused: {answers[1]}"
        assert taken is None or (answers[0] is None) == taken
        told = (statistics.mean_return, statistics.stage_seconds, statistics.episode_metrics, statistics.remarks)
        json.dumps(told, allow_nan=False)
        assert statistics.mean_return is not None
        return "refused" if answers[0] else "taken"


def check(spec: TrajectorySpec, trajectory: Trajectory, payload: bytes) -> None:
    """What a learner relies on."""
    header = trajectory.header
    assert header.run_id == RUN
    assert min(header.actor, header.restart_index, header.sequence, header.policy_version) >= 0
    assert isinstance(header.statistics, dict)
    memory = np.frombuffer(payload, np.uint8)
    assert 0 < trajectory.num_slots <= 2**16
    assert trajectory.num_bytes == len(payload)
    for name, (shape, dtype) in spec.columns().items():
        column = trajectory.columns[name]
        assert column.shape == (trajectory.num_slots, *shape)
        assert column.dtype == dtype
        assert np.shares_memory(column, memory), name
        if dtype.kind == "f":
            assert np.isfinite(column).all(), name
    for name in ("is_first", "terminated", "truncated"):
        assert trajectory.columns[name].max() <= 1
    if spec.num_actions:
        limits = np.array(spec.num_actions)
        action = trajectory.columns["action"]
        assert (action >= 0).all()
        assert (action < (limits if spec.action_shape else limits[0])).all()
    assert 0 <= trajectory.env_steps <= trajectory.num_slots * spec.unroll_length


def _legal(spec: TrajectorySpec) -> dict[str, np.ndarray]:
    """Columns that the reader takes."""
    columns = random_columns(spec, NUM_ENVS, seed=0)
    if spec.num_actions:
        columns["action"][:] = 1
    for name in ("action_mask", "memory_reset"):
        if name in columns:
            columns[name][:] = name == "action_mask"
    return columns


def _arrays(columns: dict[str, np.ndarray], edits: list[list[Any]]) -> tuple[list[tuple[str, Any]], set[str]]:
    made: list[tuple[str, Any]] = list(columns.items())
    special: list[tuple[str, int]] = []
    nullable = set()
    for kind, index, *rest in edits:
        if not made:
            break
        at = index % len(made)
        name, column = made[at]
        match kind:
            case "value":
                column = column.copy()
                with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
                    column.reshape(-1)[rest[0] % column.size] = rest[1]
                made[at] = (name, column)
            case "type":
                with np.errstate(all="ignore"):
                    made[at] = (name, column.astype(rest[0]))
            case "drop":
                del made[at]
            case "swap":
                other = rest[0] % len(made)
                made[at], made[other] = made[other], made[at]
            case "rename":
                made[at] = (rest[0], column)
            case "shape":
                shapes = {"flat": (len(column), -1), "longer": (*column.shape, 1), "deeper": (1, *column.shape)}
                made[at] = (name, column.reshape(shapes[rest[0]]))
            case "nulls" | "dictionary":
                special.append((kind, at))
    arrays = [
        (name, pa.array(column) if column.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(column.copy()))
        for name, column in made
    ]
    for kind, at in special:
        if at < len(arrays):
            name, array = arrays[at]
            nullable.add(name)
            arrays[at] = (name, _without_a_row(array) if kind == "nulls" else _encoded(array))
    return arrays, nullable


def _without_a_row(array: Any) -> Any:
    if not isinstance(array, pa.FixedShapeTensorArray):
        return pa.array([None, *array.to_pylist()[1:]], array.type)
    storage = array.storage
    mask = pa.array([True, *[False] * (len(storage) - 1)])
    storage = pa.FixedSizeListArray.from_arrays(storage.flatten(), type=storage.type, mask=mask)
    return pa.ExtensionArray.from_storage(array.type, storage)


def _encoded(array: Any) -> Any:
    return array.dictionary_encode() if not isinstance(array, pa.FixedShapeTensorArray) else array.storage


def _sealed(data: bytes) -> bytes:
    """The right checksum where the mark stands."""
    begin, mark, end = data.partition(MARK.encode())
    if not mark:
        return data
    digest = xxhash.xxh3_64(begin)
    digest.update(end)
    return begin + digest.hexdigest().encode() + end


@contextlib.contextmanager
def opened(_: Path) -> Iterator[Trajectories]:
    """Nothing is written."""
    logger = logging.getLogger("shoal.learner.trajectory_queue")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield Trajectories()
    finally:
        logger.setLevel(level)
