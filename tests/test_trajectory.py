"""The trajectory contract: what was sent is what is read, and nothing else is read at all."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import RUN, random_columns
from shoal.policy.trajectory import (
    Trajectory,
    TrajectoryError,
    TrajectoryHeader,
    TrajectorySpec,
    allocate,
    count_valid,
    from_bytes,
    to_bytes,
)


def lstm(layers, hidden):
    return tuple((name, (layers, hidden)) for name in "hc")


SPEC = TrajectorySpec(5, (4, 3), "uint8", (), "int64", lstm(2, 3))
SPECS = {
    "tokens": SPEC,
    "vectors": TrajectorySpec(3, (2,), "float32", (2,), "float32", lstm(1, 4)),
    "one step": TrajectorySpec(1, (1,), "float32", (), "int64", lstm(1, 1)),
    "same step": TrajectorySpec(5, (2,), "float32", (), "int64", lstm(2, 3), same_step=True),
    "burn-in": TrajectorySpec(5, (4, 3), "uint8", (), "int64", lstm(2, 3), burn_in=2),
}
HEADER = TrajectoryHeader(
    run_id=RUN, actor=3, restart_index=1, sequence=7, policy_version=42, statistics={"episode_returns": [0.5, 1]}
)


def columns_of(spec, num_slots=4):
    columns = random_columns(spec, num_slots, seed=0)
    if columns["obs"].dtype.kind == "u":
        columns["obs"][:] = np.random.default_rng(1).integers(0, 255, columns["obs"].shape)
    return columns


@pytest.fixture(scope="module")
def payload():
    return to_bytes(SPEC, HEADER, columns_of(SPEC))


@pytest.mark.skipif(find_spec("pandas") is None, reason="there is none")
def test_packing_an_unroll_imports_no_pandas():
    """pyarrow's own conversions import pandas where it is installed: a second of every actor's start."""
    code = (
        "import sys, numpy as np; from shoal.policy.trajectory import *; "
        "spec = TrajectorySpec(2, (3,), 'float32', (), 'int64', (('h', (1, 2)),)); "
        "header = TrajectoryHeader(run_id='a', actor=0, restart_index=0, sequence=0, policy_version=0); "
        "to_bytes(spec, header, allocate(spec, 2)); sys.exit('pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def refused(data, spec=SPEC, **options):
    """The error of bytes that must be refused, within a second of the processor: others may be busy."""
    start = time.process_time()
    with pytest.raises(TrajectoryError) as caught:
        from_bytes(spec, data, **options)
    assert time.process_time() - start < 1
    return str(caught.value)


@pytest.mark.parametrize(("num_actions", "shape", "wrong"), [((4,), (), 4), ((4,), (), -1), ((2, 5), (2,), 2)])
def test_actions_out_of_range_are_refused(num_actions, shape, wrong):
    """An index beyond the logits: an IndexError, or on a GPU an assertion that ends the learner."""
    spec = dataclasses.replace(SPEC, action_shape=shape, num_actions=num_actions)
    columns = columns_of(spec)
    columns["action"][:] = np.array(num_actions if shape else num_actions[0]) - 1
    from_bytes(spec, to_bytes(spec, HEADER, columns))
    columns["action"][(1, 2, 0) if shape else (1, 2)] = wrong
    assert "indices of" in refused(to_bytes(spec, HEADER, columns), spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_round_trip_without_a_copy(spec):
    """A column lost, transposed or copied; a header that comes back changed."""
    columns = columns_of(spec)
    payload = to_bytes(spec, HEADER, columns)
    trajectory = from_bytes(spec, payload, run_id=RUN, max_slots=4)
    assert isinstance(trajectory, Trajectory)
    assert trajectory.header == HEADER
    assert trajectory.num_bytes == payload.nbytes
    assert trajectory.num_slots == 4
    assert trajectory.columns.keys() == columns.keys()
    for name, column in columns.items():
        got = trajectory.columns[name]
        assert got.dtype == column.dtype, name
        np.testing.assert_array_equal(got, column)
        assert np.shares_memory(got, payload), name
    for same in (payload.tobytes(), pa.py_buffer(payload), memoryview(payload)):
        assert from_bytes(spec, same).header == HEADER


def test_counts_valid_transitions():
    """Void transitions in the books, row 0's flag taken for one of them, or an end in the same step for a void one."""
    columns = {
        "is_first": np.array([[1, 0, 0, 1], [0, 1, 0, 0]], np.uint8),
        "terminated": np.array([[0, 0, 0], [0, 0, 0]], np.uint8),
        "truncated": np.array([[0, 0, 1], [0, 0, 0]], np.uint8),
    }
    assert count_valid(columns) == 5
    columns["truncated"][:] = 0
    assert count_valid(columns) == 4
    columns = columns_of(SPEC)
    trajectory = from_bytes(SPEC, to_bytes(SPEC, HEADER, columns))
    assert trajectory.env_steps == count_valid(columns) < columns["reward"].size


def test_unwritten_values_are_loud():
    """A value that nobody wrote and everybody trains on."""
    columns = columns_of(SPEC)
    for name, column in columns.items():
        if name in ("obs", "training_env_id", "action"):
            continue
        saved = column.copy()
        column[:] = allocate(SPEC, 4)[name]
        assert name in refused(to_bytes(SPEC, HEADER, columns))
        column[:] = saved


def test_plain_pyarrow_reads_it(payload):
    """A format that only we can read."""
    batch = pa.ipc.open_stream(payload).read_next_batch()
    assert batch.schema.metadata[b"policy_version"] == b"42"
    reward = batch["reward"].to_numpy_ndarray()
    np.testing.assert_array_equal(reward, columns_of(SPEC)["reward"])
    assert batch["obs"].to_numpy_ndarray().shape == (4, 6, 4, 3)
    assert batch["training_env_id"].to_numpy().tolist() == [0, 1, 2, 3]


def test_every_truncation_is_refused(payload):
    """A write that was cut short; the end-of-stream marker counts."""
    for length in {*range(0, len(payload), 7), *range(len(payload) - 40, len(payload))}:
        refused(payload[:length])
    refused(np.concatenate([payload, payload[:1]]))


def test_every_flipped_bit_is_refused(payload):
    """Bytes that no checksum covers: metadata, padding, lengths and offsets, the end of the stream."""
    for bit in np.random.default_rng(0).choice(len(payload) * 8, 1500, replace=False).tolist():
        damaged = payload.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        refused(damaged)


@settings(max_examples=200)
@given(junk=st.binary(max_size=200), at=st.floats(0, 1), shift=st.integers(0, 64))
def test_junk_is_refused(payload, junk, at, shift):
    """A crash, a hang or an error of another type where bytes are replaced, inserted or are nothing but junk."""
    refused(junk)
    data = payload.tobytes()
    begin = int(at * len(data))
    for damaged in (data[:begin] + junk + data[begin + shift :], data[:begin] + junk + data[begin + len(junk) :]):
        if damaged != data:
            refused(damaged)


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_forged_words_are_refused(payload, value):
    """Lengths and offsets of Arrow's own headers that point elsewhere: a read outside the payload ends the process."""
    headers = len(payload) - sum(c.nbytes for c in columns_of(SPEC).values())
    for begin in range(0, headers, 4):
        forged = payload.copy()
        forged[begin : begin + 4] = value
        if (forged != payload).any():
            refused(forged)


# What a careful forger can do: a right checksum over wrong contents.


def forge(*, columns=None, metadata=None, batches=1, options=None, nulls=None, slots=None):
    """Bytes as ``to_bytes`` makes them, checksum included, of whatever is given."""
    columns = columns or columns_of(SPEC)
    arrays = {}
    for name, column in columns.items():
        arrays[name] = pa.array(column) if column.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(column)
    if nulls:
        storage = arrays[nulls].storage
        storage = pa.FixedSizeListArray.from_arrays(
            storage.flatten(), type=storage.type, mask=pa.array([True, *[False] * (len(storage) - 1)])
        )
        arrays[nulls] = pa.ExtensionArray.from_storage(arrays[nulls].type, storage)
    known = pa.ipc.open_stream(to_bytes(SPEC, HEADER, columns_of(SPEC))).schema.metadata
    known = {key.decode(): value.decode() for key, value in known.items()} | (metadata or {})
    mark = "?" * 16
    known = {key: value for key, value in known.items() if value is not None} | {"checksum": mark}
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in arrays.items()], known)
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for _ in range(batches):
            writer.write_batch(batch.slice(0, slots))
    return seal(sink.getvalue().to_pybytes(), mark)


def seal(data, mark):
    """The right checksum where ``mark`` stands."""
    begin, end = data.split(mark.encode(), 1)
    digest = xxhash.xxh3_64(begin)
    digest.update(end)
    return begin + digest.hexdigest().encode() + end


def with_column(name, value):
    columns = columns_of(SPEC)
    columns[name] = value(columns[name])
    return columns


def assign(where, value):
    def change(column):
        column = column.copy()
        column[where] = value
        return column

    return change


def test_the_forger_can_forge():
    """A forger whose every work is refused for its checksum shows nothing."""
    assert from_bytes(SPEC, forge()).header == HEADER


CONTENTS = {
    "extra column": (lambda: {"columns": columns_of(SPEC) | {"extra": np.zeros(4)}}, "expected columns"),
    "missing column": (
        lambda: {"columns": {k: v for k, v in columns_of(SPEC).items() if k != "reward"}},
        "expected columns",
    ),
    "other order": (lambda: {"columns": dict(reversed(columns_of(SPEC).items()))}, "expected columns"),
    "other type": (lambda: {"columns": with_column("reward", lambda c: c.astype(np.float64))}, "expected columns"),
    "other shape": (lambda: {"columns": with_column("reward", lambda c: c[:, 1:].copy())}, "expected columns"),
    "nulls": (lambda: {"nulls": "reward"}, "nulls|expected columns"),
    "flag of 2": (lambda: {"columns": with_column("is_first", assign((1, 2), 2))}, "is_first must hold 0 or 1, got 2"),
    "NaN": (lambda: {"columns": with_column("reward", assign((1, 2), np.nan))}, "reward has 1 non-finite"),
    "infinite": (lambda: {"columns": with_column("initial_c", assign((1, 0, 2), np.inf))}, "initial_c has 1 non-"),
    "compressed": (lambda: {"options": pa.ipc.IpcWriteOptions(compression="lz4")}, "compressed"),
    "two batches": (lambda: {"batches": 2}, "more than one"),
    "no batch": (lambda: {"batches": 0}, "not an Arrow stream"),
    "no slots": (lambda: {"slots": 0}, "slots, got 0"),
    "missing metadata": (lambda: {"metadata": {"actor": None}}, "expected metadata"),
    "more metadata": (lambda: {"metadata": {"x": "y"}}, "expected metadata"),
    "other format": (lambda: {"metadata": {"format_version": "1"}}, "expected format version 4, got 1"),
    "other spaces": (lambda: {"metadata": {"spaces_hash": "0" * 16}}, "expected columns"),
    "no number": (lambda: {"metadata": {"sequence": "seven"}}, "seven"),
    "huge number": (lambda: {"metadata": {"sequence": "7" * 9999}}, "metadata that cannot be read"),
    "negative": (lambda: {"metadata": {"policy_version": "-1"}}, "numbers from 0"),
    "no JSON": (lambda: {"metadata": {"statistics": "{"}}, "metadata that cannot be read"),
    "no object": (lambda: {"metadata": {"statistics": "[]"}}, "JSON object"),
    "beyond an integer": (lambda: {"metadata": {"policy_version": str(2**63)}}, "numbers from 0"),
    "returns that are none": (lambda: {"metadata": {"statistics": '{"episode_returns": 3}'}}, "episode_returns is 3"),
    "a return of NaN": (lambda: {"metadata": {"statistics": '{"episode_returns": [NaN]}'}}, r"is \[nan\]"),
    "a remark without its count": (lambda: {"metadata": {"statistics": '{"remarks": {"a": 1}}'}}, "remarks is"),
    "deep JSON": (lambda: {"metadata": {"statistics": "[" * 100_000}}, "metadata that cannot be read"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_wrong_contents_are_refused(what):
    """Well-formed bytes that are no trajectory: what they hold would crash or poison the learner."""
    make, message = CONTENTS[what]
    assert re.search(message, refused(forge(**make())))


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_an_end_without_its_reset_is_refused(flag, same_step):
    """An environment that ends an episode in another form than it says: the next one would run on with its memory."""
    spec = TrajectorySpec(5, (2,), "float32", (), "int64", lstm(2, 3), same_step=same_step)
    columns = random_columns(spec, 4, seed=0)
    for name in ("is_first", "terminated", "truncated"):
        columns[name][:] = 0
    columns[flag][2, 3] = 1
    message = f"slot 2, transition 3.*reset in the {'same' if same_step else 'next'} step"
    assert re.search(message, refused(to_bytes(spec, HEADER, columns), spec))
    columns["is_first"][2, 5 - same_step] = 1
    from_bytes(spec, to_bytes(spec, HEADER, columns))
    if not same_step:
        columns["is_first"][2, 4] = 1
        assert re.search(message, refused(to_bytes(spec, HEADER, columns), spec))


@pytest.mark.parametrize("value", [0, 1, 3, 0x40, 0x7F, 0x80, 0xFF])
def test_forged_offsets_are_refused(payload, value):
    """Arrow's own lengths and offsets changed with a right checksum: a read elsewhere, a huge allocation, a crash."""
    data = payload.tobytes()
    checksum = pa.ipc.open_stream(data).schema.metadata[b"checksum"].decode()
    body = pa.ipc.open_stream(data).schema.serialize().size
    begin = body + 8
    end = len(data) - sum(-(-c.nbytes // 8) * 8 for c in columns_of(SPEC).values()) - 8
    good = from_bytes(SPEC, payload)
    for place in range(begin, end):
        forged = seal(data[:place] + bytes([value]) + data[place + 1 :], checksum)
        start = time.process_time()
        try:
            got = from_bytes(SPEC, forged)
        except TrajectoryError:
            pass
        else:  # the byte means nothing, or other bytes of the payload are read: they are in range all the same
            assert got.num_slots <= good.num_slots
        assert time.process_time() - start < 1


def test_strangers_are_refused(payload):
    """A batch of another run, another environment, or larger than what was asked for."""
    assert f"batch of run {RUN}, this is run another" in refused(payload, run_id="another")
    assert "slots, got 4" in refused(payload, max_slots=3)
    assert "expected columns" in refused(payload, TrajectorySpec(5, (4, 3), "uint8", (2,), "int64", lstm(2, 3)))
    assert from_bytes(SPEC, payload, run_id=RUN, max_slots=4)


def test_other_arrow_data_is_refused():
    """Anything else that Arrow can read: a file, a table without metadata, a schema alone."""
    table = pa.table({"reward": [1.0, 2.0]})
    for make in (pa.ipc.new_stream, pa.ipc.new_file):
        sink = pa.BufferOutputStream()
        with make(sink, table.schema) as writer:
            writer.write_table(table)
        refused(sink.getvalue())
    refused(SPEC.schema().serialize())
    refused(b"")
    refused(np.zeros(0, np.uint8))
