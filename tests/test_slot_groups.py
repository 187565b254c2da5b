"""Slots in groups, one of which is acted for while the others are stepped: the same trajectories, and nothing left."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from make_env import env_spec, make_env
from rollouts import make_policy
from scripted_envs import NUM_ACTIONS, Script
from scripted_vectors import ID, MODES, Rows, environment, is_alive, process_ids, step
from service import make_setup
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import actions_of, observation_of
from shoal.envs.boundary import DiscreteActions, EnvironmentFault, EnvSpec, GroupedEnvironment, StepRows, VectorSpace
from shoal.policy.trajectory import Trajectory, from_bytes
from shoal.policy.weights import flatten_weights

SLOTS, UNROLL = 5, 9


class ScriptedGroups:
    """Scripts as an environment in the same-step form; with ``cuts``, stepped elsewhere in groups that begin there.

    The first episode of every other slot is a short one. Says in ``calls`` what is done when.
    """

    def __init__(self, *cuts: int) -> None:
        self.spec = EnvSpec(
            env_id="scripts",
            observation=VectorSpace(size=4),
            actions=DiscreteActions(names=(tuple("abc"[:NUM_ACTIONS]),)),
            same_step=True,
        )
        self.num_envs, self.faults = SLOTS, []
        self.scripts = [Script(salt) for salt in range(SLOTS)]
        self.short_episode = np.arange(SLOTS) % 2 == 0
        self.groups = [ScriptedGroup(self, slice(*ends)) for ends in itertools.pairwise((*cuts, SLOTS))]
        self.calls: list[tuple[str, int]] = []
        self.fails: tuple[str, int] | None = None

    def reset(self, obs: np.ndarray) -> None:
        for slot, script in enumerate(self.scripts):
            self.show(slot, script.reset(), obs[slot])

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        self.step_slots(slice(0, SLOTS), action, rows)

    def step_slots(self, slots: slice, action: np.ndarray, rows: StepRows) -> None:
        assert rows.final_obs is not None
        for row, slot in enumerate(range(SLOTS)[slots]):
            script = self.scripts[slot]
            state, rows.reward[row], rows.terminated[row], rows.truncated[row] = script.step(int(action[row]))
            rows.is_first[row] = rows.terminated[row] | rows.truncated[row]
            if rows.is_first[row]:
                self.show(slot, state, rows.final_obs[row])
                state = script.reset()
                # Of the episode that the next step may end.
                self.short_episode[slot] = False
            self.show(slot, state, rows.obs[row])
            if state[1] == 5:
                self.faults.append(f"slot {slot}, digest {state[2]}")

    def show(self, slot: int, state: tuple[int, int, int], obs: np.ndarray) -> None:
        obs[:] = slot / 5, state[0] / 10, state[1] / 9, state[2] / 9973

    def call(self, what: str, first: int) -> None:
        self.calls.append((what, first))
        if self.fails == (what, first):
            raise EnvironmentFault("as told")

    def close(self) -> None:
        self.calls.append(("close", 0))


class ScriptedGroup:
    def __init__(self, env: ScriptedGroups, slots: slice) -> None:
        self.env, self.slots = env, slots
        self.action: np.ndarray | None = None

    def step_begin(self, action: np.ndarray) -> None:
        assert self.action is None
        self.env.call("begin", self.slots.start)
        self.action = action.copy()

    def step_end(self, rows: StepRows) -> None:
        assert self.action is not None
        self.env.call("end", self.slots.start)
        self.env.step_slots(self.slots, self.action, rows)
        self.action = None


def make_worker(env: Any, *, unroll_length: int = UNROLL, burn_in: int = 0) -> RolloutWorker:
    policy = make_policy(observation_of(env.spec), actions_of(env.spec))
    identity: Any = {"run_id": "test", "actor": 3, "restart_index": 0}
    return RolloutWorker(env, policy, unroll_length, seed=4, burn_in=burn_in, **identity)


def unrolls(worker: RolloutWorker, count: int) -> list[Trajectory]:
    weights = flatten_weights(worker.policy, 0)
    return [from_bytes(worker.spec, worker.rollout(weights), run_id="test") for _ in range(count)]


def assert_same(expected: list[Trajectory], found: list[Trajectory]) -> None:
    """To the bit, but for what products of matrices of other sizes round: log-probabilities and states."""
    for one, other in zip(expected, found, strict=True):
        assert set(one.columns) == set(other.columns)
        for name, column in one.columns.items():
            tolerance = 1e-6 if name == "behavior_log_prob" else 1e-4 if name.endswith(("_h", "_c")) else 0.0
            np.testing.assert_allclose(other.columns[name], column, rtol=0, atol=tolerance, err_msg=name)
        statistics = [dict(each.header.statistics) for each in (one, other)]
        for each in statistics:
            for name in ("policy_seconds", "env_seconds", "pack_seconds"):
                del each[name]
        assert statistics[0] == statistics[1]
        assert dataclasses.replace(one.header, statistics={}) == dataclasses.replace(other.header, statistics={})


@torch.no_grad()
def assert_burn_in_leads_to_the_initial_state(worker: RolloutWorker, found: list[Trajectory]) -> None:
    for one in found:
        columns = {name: torch.from_numpy(column.copy()) for name, column in one.columns.items()}
        state: Any = tuple(columns[f"burn_in_{part}"].transpose(0, 1) for part in "hc")
        for t in range(worker.spec.burn_in):
            is_first = columns["burn_in_is_first"][:, t].bool()
            _, state = worker.policy.step(columns["burn_in_obs"][:, t], is_first, state)
        if one.header.sequence:
            for part, name in zip(state, ("initial_h", "initial_c"), strict=True):
                torch.testing.assert_close(part.transpose(0, 1), columns[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize("cuts", [(0,), (0, 2), (0, 1, 3, 4)])
def test_groups_change_nothing(cuts: tuple[int, ...], burn_in: int) -> None:
    """Catches slots that get another's action, random number, memory or row, a row that is acted on before it is
    there, episodes that are counted for other slots or taken for whole, and a burn-in state of another step.
    """
    expected = unrolls(make_worker(ScriptedGroups(), burn_in=burn_in), 6)
    env = ScriptedGroups(*cuts)
    assert isinstance(env, GroupedEnvironment)
    worker = make_worker(env, burn_in=burn_in)
    found = unrolls(worker, 6)
    assert_same(expected, found)
    lengths = [length for one in found for length in one.header.statistics["episode_lengths"]]
    assert len(set(lengths)) > 3
    short_ones = 3
    ends = sum(int((one.columns["terminated"] | one.columns["truncated"]).sum()) for one in found)
    assert len(lengths) == ends - short_ones > 20
    if burn_in:
        assert_burn_in_leads_to_the_initial_state(worker, found)
    assert any(one.header.statistics["faults"] for one in expected)


def test_where_unrolls_are_cut_changes_nothing_with_groups() -> None:
    """Catches a step that is still under way when the trajectory is shipped, or a row lost between two unrolls."""
    names = ("obs", "action", "reward", "terminated", "truncated", "is_first")
    streams = []
    for length in (1, 6, 18):
        columns = [
            one.columns for one in unrolls(make_worker(ScriptedGroups(0, 2), unroll_length=length), 18 // length)
        ]
        streams.append([np.concatenate([each[name][:, :length] for each in columns], 1) for name in names])
    for stream in streams[1:]:
        for column, expected in zip(stream, streams[0], strict=True):
            np.testing.assert_array_equal(column, expected)


def test_a_group_is_stepped_while_the_next_is_acted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches groups that take turns, which is slower than none, and a step that nobody ends."""
    env = ScriptedGroups(0, 3)
    worker = make_worker(env, unroll_length=3)
    act = worker.policy.act

    def watched(obs: Any, ids: tuple[int, ...], is_first: Any) -> Any:
        env.calls.append(("act", ids[0] - worker.training_env_ids[0]))
        return act(obs, ids, is_first)

    monkeypatch.setattr(worker.policy, "act", watched)
    unrolls(worker, 1)
    first = [("act", 0), ("begin", 0), ("act", 3), ("begin", 3)]
    later = [("end", 0), ("act", 0), ("begin", 0), ("end", 3), ("act", 3), ("begin", 3)]
    assert env.calls == [*first, *later, *later, ("end", 0), ("end", 3)]


@pytest.mark.parametrize("fails", [("begin", 0), ("begin", 2), ("end", 0), ("end", 2), ("act", 2)])
def test_a_failure_leaves_no_step_under_way(fails: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that go on computing for nobody, and an answer that the next call takes for its own."""
    env = ScriptedGroups(0, 2)
    worker = make_worker(env)
    env.fails = fails
    error: type[Exception] = EnvironmentFault
    if fails[0] == "act":
        error = ZeroDivisionError
        monkeypatch.setattr(worker.policy, "act", lambda *_: 1 // 0)
    with pytest.raises(error):
        unrolls(worker, 1)
    assert env.calls[-1] == ("close", 0)
    worker.close()
    assert env.calls.count(("close", 0)) == 1


def test_a_failure_in_this_thread_is_for_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an environment that is closed under an owner who handled the exception as before."""
    env = ScriptedGroups()
    worker = make_worker(env)
    with monkeypatch.context() as patch:
        patch.setattr(env, "step", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            unrolls(worker, 1)
    assert env.calls == []


@pytest.mark.parametrize("mode", MODES)
def test_processes_in_groups_are_the_same_environment(mode: str) -> None:
    """Catches other seeds, an end or a fault in another slot's row, and messages of other slots or steps: in the form
    that the mode has, with environments that all break now and then.
    """
    settings: Any = {"autoreset_mode": mode, "how": "raises", "at": 14}
    found = {}
    for groups in (None, 1, 2, 3):
        how = {"vectorization": "sync"} if groups is None else {"vectorization": "async", "slot_groups": groups}
        env = make_env(ID, SLOTS, 0, **how, **settings)
        worker = make_worker(env, burn_in=2)
        try:
            found[groups] = unrolls(worker, 4)
            assert len(env.groups) == (groups or 0)
        finally:
            worker.close()
        assert multiprocessing.active_children() == []
    faults = [message for one in found[None] for message in one.header.statistics["faults"]]
    assert len(faults) > SLOTS
    for groups in (1, 2, 3):
        assert_same(found[None], found[groups])


def test_unless_told_otherwise_there_are_two_groups() -> None:
    """Catches slots without a group, a group without slots, and groups where nothing overlaps."""
    for slots, settings, expected in (
        (5, {}, [(0, 2), (2, 5)]),
        (1, {}, [(0, 1)]),
        (2, {"slot_groups": 7}, [(0, 1), (1, 2)]),
        (3, {"slot_groups": 1}, [(0, 3)]),
    ):
        with environment(slots, **settings) as env:
            assert not env.groups
            env.reset(Rows(env).rows.obs)
            assert [(group.slots.start, group.slots.stop) for group in env.groups] == expected
    with environment(2, vectorization="sync") as env:
        env.reset(Rows(env).rows.obs)
        assert not env.groups
    assert env_spec(ID, vectorization="async", slot_groups=4) == env_spec(ID)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slot_groups": 0}, "slot_groups.*\n.*greater than or equal to 1"),
        ({"slot_groups": "two"}, "slot_groups.*\n.*valid integer"),
        ({"slot_groups": True}, "slot_groups.*\n.*valid integer"),
        ({"slot_groups": 2, "vectorization": "sync"}, "slot_groups=2 is for vectorization=async"),
    ],
)
def test_wrong_groups_are_refused(settings: dict[str, Any], said: str) -> None:
    """Catches a typing error that turns up when the first actor starts, or never."""
    with pytest.raises(ValueError, match=said):
        env_spec(ID, **{"vectorization": "async", **settings})


@pytest.fixture
def worker() -> Iterator[RolloutWorker]:
    """Four slots in two groups of processes."""
    worker = make_setup(ID, num_envs=4, vectorization="async").make_worker(0, 0)
    yield worker
    worker.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("slot", [0, 3])
def test_a_process_that_dies_ends_all_groups(slot: int, worker: RolloutWorker) -> None:
    """Catches a fault that names a slot of the group for one of the actor, and other groups' processes that stay."""
    unrolls(worker, 1)
    env: Any = worker.envs
    processes = process_ids(env)
    assert len(set(processes)) == 4
    os.kill(processes[slot], signal.SIGKILL)
    message = rf"slot {slot}: its process {processes[slot]} was killed by signal SIGKILL$"
    with pytest.raises(EnvironmentFault, match=message):
        unrolls(worker, 2)
    assert not any(is_alive(process) for process in processes)
    with pytest.raises((EnvironmentFault, gymnasium.error.AlreadyPendingCallError)):
        unrolls(worker, 1)


def test_no_answer_is_taken_for_another_calls() -> None:
    """Catches a reset that reads the answer of the step which it broke in on, and every later call one that is late."""
    with environment(3) as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        env.groups[1].step_begin(np.zeros(2, int))
        with pytest.raises(RuntimeError, match=r"reset while slots .*1, 3.* are stepped"):
            env.reset(rows.obs)
        with pytest.raises(Exception, match="pending call to `step`"):
            step(env, rows)
        with pytest.raises(Exception, match="pending call to `step`"):
            step(env, rows)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_worker_that_fails_outside_its_guard_is_told_from_others() -> None:
    """Catches the number of a process of the whole that is looked up in a group, and a close that stumbles over it."""
    with environment(4, how="interrupts", at=3) as env:
        rows = Rows(env).rows
        env.reset(rows.obs)
        step(env, rows, 2)
        env.groups[1].step_begin(np.zeros(2, int))
        with pytest.raises(KeyboardInterrupt):
            env.groups[1].step_end(rows.of(slice(2, 4)))
