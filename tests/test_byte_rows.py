"""Observations of narrow types travel as rows of bytes; the network reads the numbers that the environment gave."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import make_learner
from service import make_setup
from shoal.actors.rollout import trajectory_spec
from shoal.actors.worker_setup import observation_of
from shoal.envs.boundary import EnvSpec
from shoal.envs.readers import observation_reader
from shoal.envs.reports import Reports
from shoal.envs.spaces import Declared, make_spec
from shoal.envs.writers import Malformed, leaves_of, make_writer
from shoal.learner.batch import BatchAssembler
from shoal.policy import FastPolicy
from shoal.policy.observation import VectorObservation, observation_from_json, observation_to_json
from shoal.policy.trajectory import TrajectoryError, TrajectoryHeader, allocate, from_bytes, to_bytes
from shoal.policy.weights import flatten_weights

HEADER = TrajectoryHeader(run_id="r", actor=0, restart_index=0, sequence=0, policy_version=0)


def spec_of(space: spaces.Space[Any]) -> EnvSpec:
    return make_spec("x", Declared(space, spaces.Discrete(2)))


BOXES = {
    "uint8": spaces.Box(0, 255, (5,), np.uint8),
    "int8": spaces.Box(-100, 100, (3,), np.int8),
    "int16": spaces.Box(-9999, 9999, (2, 2), np.int16),
    "float16": spaces.Box(-2, 2, (3,), np.float16),
    "bool": spaces.Box(0, 1, (4,), np.bool_),
}


@pytest.mark.parametrize(
    ("space", "stored", "row"),
    [
        (BOXES["uint8"], "uint8", 5),
        (BOXES["int8"], "int8", 3),
        (BOXES["int16"], "int16", 8),
        (BOXES["float16"], "float16", 6),
        (BOXES["bool"], "uint8", 4),
        (spaces.Discrete(500), "uint8", 500),
        (spaces.MultiBinary(9), "uint8", 9),
        (spaces.Dict(a=BOXES["uint8"], b=spaces.MultiDiscrete([3, 4])), "uint8", 12),
        (spaces.Tuple([BOXES["uint8"], BOXES["int8"]]), "int16", 16),
        (spaces.Tuple([BOXES["int8"], BOXES["float16"]]), "float16", 12),
        # No narrow type holds both.
        (spaces.Tuple([BOXES["int16"], BOXES["float16"]]), "float32", 7),
        (spaces.Dict(a=BOXES["uint8"], b=spaces.Box(-1, 1, (2,), np.float32)), "float32", 7),
        (spaces.Box(0, 7, (2,), np.int64), "float32", 2),
        (spaces.Box(0, 7, (2,), np.uint16), "float32", 2),
    ],
    ids=str,
)
def test_rows_are_as_wide_as_what_is_declared(space: spaces.Space[Any], stored: str, row: int) -> None:
    """Catches bytes that travel as four, and a type that cannot hold what the environment declares."""
    spec = spec_of(space)
    observation = observation_of(spec)
    assert isinstance(observation, VectorObservation)
    assert (observation.stored, spec.obs_shape) == (stored, (row,))
    assert spec.obs_dtype == (np.float32 if stored == "float32" else np.uint8)
    # What is saved with weights: equal policies have equal descriptions, whatever carried their observations.
    plain = observation_to_json(observation)
    assert ("stored" in plain) == (stored != "float32")
    assert observation_from_json(json.loads(json.dumps(plain))).stored == stored  # type: ignore[union-attr]  # a vector
    assert observation == dataclasses.replace(observation, stored="float32")


LEAVES = st.sampled_from(
    [
        *BOXES.values(),
        spaces.Discrete(4, start=-1),
        spaces.MultiBinary((3,)),
        spaces.MultiDiscrete([2, 5]),
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Box(0, 255, (16, 12, 3), np.uint8),
        spaces.Box(0, 1, (12, 16, 2), np.float32),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LEAVES, min_size=1, max_size=4), st.integers(0, 2**31), st.booleans())
def test_what_is_written_is_read(leaves: list[spaces.Space[Any]], seed: int, batched: bool) -> None:
    """Catches parts at each other's places, in the network and in the files that others read.

    The reference is gymnasium's own ``flatten``, part by part.
    """
    space = spaces.Tuple(leaves, seed=seed)
    spec = spec_of(space)
    observation = observation_of(spec)
    given = [space.sample() for _ in range(3)]
    rows = np.full((3, 2, *spec.obs_shape), 255, spec.obs_dtype)[:, 1]
    if batched:
        together = tuple(np.stack([one[index] for one in given]) for index in range(len(leaves)))
        make_writer(space, spec, batched=True)(together, rows)
    else:
        for one, row in zip(given, rows, strict=True):
            make_writer(space, spec, batched=False)(one, row[None])
    seen = FastPolicy(observation, ["a", "b"]).read(torch.from_numpy(rows))
    assert seen.dtype == torch.float32
    is_image = [isinstance(leaf, spaces.Box) and len(leaf.shape) == 3 for _, leaf in leaves_of(space)]
    order = [index for index, image in enumerate(is_image) if not image]
    order += [index for index, image in enumerate(is_image) if image]
    for one, row in zip(given, seen, strict=True):
        flat = [spaces.flatten(leaves[index], one[index]) for index in order]
        np.testing.assert_array_equal(row, np.concatenate(flat).astype(np.float32))
    read_space, read = observation_reader(spec)
    assert read_space == space
    for index, part in enumerate(read(rows)):
        np.testing.assert_array_equal(part, np.stack([np.asarray(one[index]) for one in given]))


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (BOXES["uint8"], [0, 1, 2, 3, 300], "must be a whole number from 0 to 255"),
        (BOXES["int8"], np.array([0.5, 0, 0]), "must be a whole number from -128 to 127"),
        (BOXES["int16"], np.full((2, 2), -40000), "must be a whole number from -32768 to 32767"),
        (BOXES["bool"], np.array([0.5, 0, 0, 1]), "must be a whole number"),
        (BOXES["float16"], np.array([0, np.nan, 0]), "not finite"),
        # int16 rows, because of the part beside it: 300 is still none of a byte.
        (spaces.Tuple([BOXES["uint8"], BOXES["int8"]]), ([0, 0, 0, 0, 300], [0, 0, 0]), "from 0 to 255"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(space: spaces.Space[Any], value: Any, message: str) -> None:
    """Catches a number that becomes another one because its type is narrow."""
    spec = spec_of(space)
    value = tuple(map(np.asarray, value)) if isinstance(value, tuple) else np.asarray(value)
    with pytest.raises(Malformed, match=message):
        make_writer(space, spec, batched=False)(value, np.zeros((1, *spec.obs_shape), np.uint8))


def test_what_leaves_the_bounds_and_fits_is_kept() -> None:
    """Catches a remark that changes the number, and infinity where half precision ends."""
    reports = Reports()
    spec = spec_of(BOXES["int8"])
    rows = np.zeros((1, *spec.obs_shape), np.uint8)
    make_writer(BOXES["int8"], spec, batched=False, reports=reports)(np.array([120, -120, 0]), rows)
    assert rows.view(np.int8).tolist() == [[120, -120, 0]]
    space = spaces.Box(-np.inf, np.inf, (2,), np.float16)
    spec = spec_of(space)
    rows = np.zeros((1, *spec.obs_shape), np.uint8)
    make_writer(space, spec, batched=False, reports=reports)(np.array([1e6, -3.0]), rows)
    assert rows.view(np.float16).tolist() == [[65504.0, -3.0]]
    assert sorted(reports.counts.values()) == [1, 1]


@pytest.mark.parametrize("column", ["obs", "final_obs", "burn_in_obs"])
@pytest.mark.parametrize("part", ["numbers", "image"])
def test_a_number_that_is_not_finite_is_seen_among_bytes(column: str, part: str) -> None:
    """Catches NaN that reaches the weights because its row is bytes; a byte image may hold any."""
    space = spaces.Dict(
        v=spaces.Box(-1, 1, (3,), np.float32),
        deep=spaces.Box(0, 1, (16, 16, 1), np.float32),
        screen=spaces.Box(0, 255, (16, 16, 3), np.uint8),
    )
    spec = dataclasses.replace(spec_of(space), same_step=True)
    contract = trajectory_spec(spec, 2, burn_in=1)
    columns = allocate(contract, 2)
    for name, values in columns.items():
        values[:] = 0
        if name == "training_env_id":
            values[:] = np.arange(2)
    columns["obs"][..., -16 * 16 * 3 :] = 255  # bytes that would be NaN
    assert from_bytes(contract, to_bytes(contract, HEADER, columns)).num_slots == 2
    start, stop, dtype = contract.float_spans[part == "image"]
    columns[column][1, -1, start:stop].view(dtype)[-1] = np.nan
    with pytest.raises(TrajectoryError, match=f"column {column} has 1 non-finite"):
        from_bytes(contract, to_bytes(contract, HEADER, columns))


class Bytes(gymnasium.Env[Any, Any]):
    """Asks for the quarter of a byte's range that the first observation was in."""

    observation_space = spaces.Box(0, 255, (2,), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t, self.byte = 0, int(self.np_random.integers(256))
        return np.array([self.byte, 0], np.uint8), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        reward = float(self.t == 3 and action == self.byte // 64)
        return np.array([0, self.t == 2], np.uint8), reward, self.t == 3, False, {}


class Halves(Bytes):
    observation_space = spaces.Box(0, 255, (2,), np.float16)  # type: ignore[assignment]  # generic in its type


class Floats(Bytes):
    observation_space = spaces.Box(0, 255, (2,), np.float32)  # type: ignore[assignment]  # the same


for kind in (Bytes, Halves, Floats):
    gymnasium.register(f"{kind.__name__}-v0", kind)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("env_id", ["Bytes-v0", "Halves-v0"])
def test_training_is_that_of_float32(env_id: str, vectorization: str) -> None:
    """Catches statistics, a memory or gradients that read something else than the environment's numbers."""
    hashes = []
    for name, how in ((env_id, vectorization), ("Floats-v0", "sync")):
        # All slots at once: a processor may round the rows of half a batch otherwise.
        setup = make_setup(name, num_envs=4, unroll_length=8, vectorization=how, slot_groups=1)
        setup = dataclasses.replace(setup, normalize_observations=True, normalize_values=True)
        worker = setup.make_worker(0, 0)
        try:
            torch.manual_seed(0)
            learner = make_learner(setup.make_policy(), epochs=2, minibatches=2)
            for version in range(3):
                payload = worker.rollout(flatten_weights(learner.policy, version))
                batch = BatchAssembler(worker.spec, 4).assemble([from_bytes(worker.spec, payload)])
                assert learner.update(batch).log_prob_error < 1e-5  # type: ignore[operator]  # checked each time
            assert (worker.spec.obs_dtype == "uint8") == (name == env_id)
        finally:
            worker.close()
        hashes.append(flatten_weights(learner.policy, 0).sha256)
    assert hashes[0] == hashes[1]
