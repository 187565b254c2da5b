"""Answers that are sloppy but clear are taken, wrong ones are faults, and what is told beside the rows is kept."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from echo_envs import CASES, HOWS, SLOTS, Case, echo, even
from gymnasium import spaces
from scripted_vectors import MODES, Rows
from service import make_setup
from shoal.envs.boundary import EnvironmentFault, ReportingEnvironment, VectorEnvironment
from shoal.envs.play import join, play
from shoal.envs.reports import CLIPPED, MOST_NUMBERS, OUT_OF_BOUNDS, UNDECLARED, Reports, numbers_in
from shoal.envs.writers import OBSERVATION_LIMIT
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import MOST_METRICS, RunStatistics, TrajectoryReport
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.actions import Discrete
from shoal.policy.trajectory import from_bytes
from shoal.policy.weights import flatten_weights

BYTES = spaces.Box(0, 255, (2,), np.uint8)
PICTURE = spaces.Box(0, 255, (8, 8, 3), np.uint8)
F32 = spaces.Box(-9, 9, (2,), np.float32)
OK = np.array([1, 2], np.float32)


SLOPPY: dict[str, Case] = {
    "reward of shape (1,)": Case(even, reward=lambda t: np.array([0.5 * t])),
    "reward 0-d": Case(even, reward=lambda t: np.array(0.5 * t, np.float16)),
    "reward of numpy": Case(even, reward=lambda t: np.float32(0.5 * t)),
    "flags 0 and 1": Case(even, terminated=lambda t: int(t == 4), truncated=lambda t: 0),
    "flags of shape (1,)": Case(even, terminated=lambda t: np.array([t == 4]), truncated=lambda t: np.array([0.0])),
    "int64 in a box of bytes": Case(lambda t: np.array([t, 200 + t]), BYTES),
    "whole floats in a picture": Case(lambda t: np.full((8, 8, 3), 250.0 + t), PICTURE),
    "float64": Case(lambda t: np.array([t, 1.5]), F32),
    "a list": Case(lambda t: [t, 1.5], F32),
    "an axis more": Case(lambda t: np.array([[t], [1.5]]), F32),
    "an index as a float": Case(lambda t: np.array([float(t % 3)]), spaces.Discrete(3)),
}


def steps(env: VectorEnvironment, count: int = 4) -> tuple[Any, list[Any]]:
    """The rows after each of so many steps from a reset, as lists."""
    rows = Rows(env).rows
    env.reset(rows.obs)
    found = [rows.obs.astype(float).tolist()]
    ends = []
    for _ in range(count):
        env.step(np.zeros((env.num_envs, *env.spec.action_shape), env.spec.action_dtype), rows)
        found.append(rows.obs.astype(float).tolist())
        ends.append((rows.reward.tolist(), rows.terminated.tolist(), rows.truncated.tolist()))
    return found, ends


@pytest.mark.parametrize("how", ["sync", "native", "pettingzoo"])
@pytest.mark.parametrize("name", list(SLOPPY))
def test_what_is_clear_is_taken(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches environments that are given up over a type: reward of shape (1,), ends as 0 and 1, int64 for bytes."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    case = SLOPPY[name]
    monkeypatch.setitem(CASES, "sloppy", case)
    env = echo(how, "sloppy")
    observations, ends = steps(env)
    assert env.faults == []
    assert isinstance(env, ReportingEnvironment)
    assert not env.reports.counts
    for t, row in enumerate(observations):
        expected = np.asarray(case.obs(t), np.float64).reshape(-1)
        if isinstance(case.space, spaces.Discrete):
            expected = np.eye(3)[int(expected[0])]
        assert np.reshape(row, (SLOTS, -1)).tolist() == [expected.tolist()] * SLOTS
    for t, (reward, terminated, truncated) in enumerate(ends, 1):
        assert reward == [0.5 * t] * SLOTS
        assert terminated == [t == 4] * SLOTS
        assert truncated == [False] * SLOTS
    env.close()


WRONG: dict[str, tuple[Case, str]] = {
    "300 for a byte": (Case(lambda t: np.array([1, 300 * (t == 2)], np.uint16), BYTES), r"300 .*from 0 to 255"),
    "300 for a shade": (Case(lambda t: np.full((8, 8, 3), 300 * (t == 2)), PICTURE), r"300 .*from 0 to 255"),
    "-1 for a shade": (Case(lambda t: np.full((8, 8, 3), -(t == 2)), PICTURE), r"-1 .*from 0 to 255"),
    "half a shade": (Case(lambda t: np.full((8, 8, 3), 0.5 * (t == 2)), PICTURE), r"0\.5 .*a whole number"),
    "40000 for int16": (
        Case(lambda t: np.array([40000 * (t == 2)] * 2), spaces.Box(-9, 9, (2,), np.int16)),
        r"40000 .*-32768",
    ),
    "nan": (Case(lambda t: OK * (np.nan if t == 2 else 1)), "not finite, nan"),
    "inf": (Case(lambda t: OK * (np.inf if t == 2 else 1)), "not finite, inf"),
    "a choice too many": (Case(lambda t: np.int64(3 * (t == 2)), spaces.Discrete(3)), r"3, must be 0\.\.2"),
    "half a choice": (Case(lambda t: np.float64(0.5 * (t == 2)), spaces.Discrete(3)), "must be integers"),
    "words": (Case(lambda t: np.array(["a", "b"]) if t == 2 else np.zeros(2)), "dtype <U1"),
    "a reward of two": (Case(lambda t: OK, reward=lambda t: np.zeros(1 + (t == 2))), "reward"),
    "an end of two": (Case(lambda t: OK, terminated=lambda t: 2 * (t == 2)), "terminated"),
}


@pytest.mark.parametrize("how", ["sync", "pettingzoo"])
@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_a_fault(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 300 that becomes 44, and whatever else a cast would make of a wrong answer."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    case, said = WRONG[name]
    monkeypatch.setitem(CASES, "wrong", case)
    env = echo(how, "wrong")
    rows = Rows(env).rows
    env.reset(rows.obs)
    for step in range(1, 3):
        assert env.faults == []
        env.step(np.zeros(SLOTS, np.int64), rows)
        assert rows.is_first.tolist() == [step == 2] * SLOTS
    assert re.search(said, env.faults[0]), env.faults
    env.close()


@pytest.mark.parametrize("name", [name for name in WRONG if "reward" not in name])
def test_what_is_wrong_ends_a_native_vector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same in a vector that has no guards around its slots."""
    case, said = WRONG[name]
    monkeypatch.setitem(CASES, "wrong", case)
    env = echo("native", "wrong")
    with pytest.raises(EnvironmentFault, match=said):
        steps(env)
    env.close()


@pytest.mark.parametrize("how", HOWS)
def test_an_observation_that_leaves_its_bounds_is_counted_and_kept(how: str) -> None:
    """Catches a slot that is restarted where it leaves its bounds: leaving them then pays."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    env = echo(how, "leaves its bounds")
    observations, ends = steps(env, 3)
    assert observations == [[[5.0 * t, 0.0]] * SLOTS for t in range(4)]
    assert env.faults == []
    assert [reward for reward, *_ in ends] == [[0.5 * t] * SLOTS for t in (1, 2, 3)]
    told = env.reports.take()  # type: ignore[attr-defined]
    # The steps 2 and 3 of each slot.
    assert told.counts == {OUT_OF_BOUNDS: 4}
    assert "flat index 0: 10.0 not in [-9.0, 9.0]" in told.examples[OUT_OF_BOUNDS]
    assert not env.reports  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize("how", ["sync", "native", "pettingzoo"])
def test_a_part_that_no_space_declares_is_left_out_and_counted(how: str) -> None:
    """Catches an environment that other libraries take and that was given up here, and a part that is lost silently."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    CASES["more"] = Case(lambda t: {"a": OK, "debug": OK * t, "b": OK}, spaces.Dict(a=F32, b=F32))
    env = echo(how, "more")
    observations, _ = steps(env, 3)
    assert observations == [[[1, 2, 1, 2]] * SLOTS] * 4
    assert env.faults == []
    told = env.reports.take()  # type: ignore[attr-defined]
    assert told.counts[UNDECLARED] >= 4
    assert told.examples[UNDECLARED] == "obs has debug, which its space has not: left out"
    env.close()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", ["huge", "huge float64"])
def test_a_huge_observation_is_clipped_and_poisons_nothing(case: str, how: str) -> None:
    """Catches float32's largest number on its way into the memory, which it would make NaN until the episode ends."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    env = echo(how, case)
    observations, _ = steps(env, 3)
    assert env.faults == []
    sign = 1 if case == "huge" else -1
    assert observations[2] == [[sign * OBSERVATION_LIMIT] * 512] * SLOTS
    told = env.reports.take()  # type: ignore[attr-defined]
    assert told.counts == {CLIPPED: SLOTS}
    env.close()
    torch.manual_seed(0)
    policy = FastPolicy(VectorObservation(512), Discrete((("a", "b"),)))
    state = None
    for row in observations:
        output, state = policy.step(torch.tensor(row, dtype=torch.float32), torch.zeros(SLOTS, dtype=torch.bool), state)
        assert output.logits.isfinite().all()
        assert output.value.isfinite().all()
        assert all(part.isfinite().all() for part in state)
    loss = output.value.sum() + output.logits.sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters())


def test_a_huge_observation_is_delivered() -> None:
    """Catches deliveries of an actor that are refused for ever, since its memory is NaN."""
    setup = make_setup("echo_envs:Echo-v0", num_envs=2, unroll_length=6, case="huge")
    worker = setup.make_worker(0, 0)
    payload = worker.rollout(flatten_weights(setup.make_policy(), 0))
    worker.close()
    trajectory = from_bytes(worker.spec, payload)
    assert trajectory.header.statistics["remarks"][CLIPPED][0] == 2
    assert "clipped to 1e+09" in trajectory.header.statistics["remarks"][CLIPPED][1]


TOLD = {"is_success": 1.0, "score": 7.5, "episode.r": 2.5}


@pytest.mark.parametrize("case", ["informs", "informs at a truncation"])
@pytest.mark.parametrize("how", HOWS)
def test_numbers_of_info_at_the_end_are_kept(case: str, how: str) -> None:
    """Catches ``is_success`` that is dropped, taken from a step before the end, or counted as of another slot."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    env = echo(how, case)
    found = play(env, lambda obs, is_first: np.zeros(len(obs), np.int64), 4 * SLOTS)
    env.close()
    assert found.episodes == 4 * SLOTS
    assert {name: values.tolist() for name, values in found.metrics.items()} == {
        name: [value] * 4 * SLOTS for name, value in TOLD.items()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["sync", "async"])
def test_numbers_of_info_in_every_mode(how: str, mode: str) -> None:
    """Catches the ``info`` of the next episode's first step in place of the last one's."""
    env = echo(how, "informs", autoreset_mode=mode)
    found = play(env, lambda obs, is_first: np.zeros(len(obs), np.int64), 2 * SLOTS)
    env.close()
    assert {name: values.tolist() for name, values in found.metrics.items()} == {
        name: [value] * 2 * SLOTS for name, value in TOLD.items()
    }


def test_numbers_of_episodes_that_lack_one_are_told_apart() -> None:
    """Catches a mean over episodes that had no such number."""
    parts = []
    for case in ("informs", "informs otherwise"):
        env = echo("sync", case)
        parts.append(play(env, lambda obs, is_first: np.zeros(len(obs), np.int64), SLOTS))
        env.close()
    metrics = join(parts).metrics
    assert np.isnan(metrics["score"]).tolist() == [False, False, True, True]
    assert np.isnan(metrics["other"]).tolist() == [True, True, False, False]


def test_info_without_bounds_is_bounded() -> None:
    """Catches an environment that makes a metric of every one of a thousand numbers."""
    assert len(dict(numbers_in({f"n{i}": i for i in range(1000)}))) == MOST_NUMBERS
    assert dict(numbers_in({"x" * 500: 1, 3: 4, "deep": {"er": {"no": 1}}})) == {"3": 4.0}
    statistics = RunStatistics(Ledger())
    told = {"episode_returns": [], "episode_lengths": [], "policy_seconds": 0, "env_seconds": 0, "pack_seconds": 0}
    told |= {"ignored_tokens": 0, "faults": [], "remarks": {}}
    for k in range(5):
        metrics = {f"m{k}_{i}": [1.0, 2.0] for i in range(30)}
        statistics.add_reports([TrajectoryReport(0, 0, {**told, "episode_metrics": metrics}, 0, 0)])
    assert len(statistics.episode_metrics) == MOST_METRICS
    assert statistics.episode_metrics["m0_0"] == 1.5


def test_remarks_are_said_once_and_counted() -> None:
    """Catches a warning with every unroll."""
    statistics = RunStatistics(Ledger())
    told = {"episode_returns": [], "episode_lengths": [], "policy_seconds": 0, "env_seconds": 0, "pack_seconds": 0}
    told |= {"ignored_tokens": 0, "faults": [], "episode_metrics": {}, "remarks": {OUT_OF_BOUNDS: [3, "E: obs is out"]}}
    said = [message for _ in range(4) for message in statistics.add_reports([TrajectoryReport(0, 0, told, 0, 0)])]
    assert len(said) == 1
    assert said[0].startswith("E: obs is out")
    assert statistics.remarks == {OUT_OF_BOUNDS: 12}


@pytest.mark.parametrize("how", HOWS)
def test_episodes_without_an_end_are_cut(how: str) -> None:
    """Catches an evaluation that never returns, a cut that is not said, and the first episode's rest as the second."""
    if how == "pettingzoo":
        pytest.importorskip("pettingzoo")
    env = echo(how, "endless")
    firsts = []

    def player(obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        firsts.append((is_first.copy(), obs[:, 0].copy()))
        return np.zeros(len(obs), np.int64)

    found = play(env, player, 3 * SLOTS, max_episode_steps=5)
    env.close()
    assert found.episodes == 3 * SLOTS
    assert found.cut.all()
    assert not found.terminated.any()
    assert found.lengths.tolist() == [5] * 3 * SLOTS
    assert found.returns.tolist() == [0.5 * (1 + 2 + 3 + 4 + 5)] * 3 * SLOTS
    # The player forgets where the environments were reset.
    assert [obs.tolist() for is_first, obs in firsts if is_first.any()] == [[0, 0]] * 3


def test_episodes_that_end_after_the_cut_go_on_by_themselves() -> None:
    """Catches the rest of an episode that was cut counted as the next one."""
    env = echo("sync", "ends late")
    found = play(env, lambda obs, is_first: np.zeros(len(obs), np.int64), 2 * SLOTS, max_episode_steps=7)
    env.close()
    assert found.lengths.tolist() == [7] * 2 * SLOTS
    env = echo("sync", "ends late")
    found = play(env, lambda obs, is_first: np.zeros(len(obs), np.int64), 2 * SLOTS, max_episode_steps=12)
    env.close()
    assert found.lengths.tolist() == [12] * 2 * SLOTS
    assert found.terminated.all()
    assert not found.cut.any()


def test_reports_cross_as_plain_data() -> None:
    """Catches statistics that JSON, which trajectories carry them in, does not have."""
    reports = Reports()
    reports.end_episode(3, {"a": np.float32(1.5), "b": True, "c": math.inf})
    reports.end_episode(1, None)
    ((slot, numbers),) = reports.episodes
    assert (slot, json.loads(json.dumps(numbers))) == (3, {"a": 1.5, "b": 1.0})
