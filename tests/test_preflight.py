"""Unrolls and batches that no memory holds are refused before anything is allocated, with their product."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rollouts import SMALL, make_learner, random_batch, small_policy
from shoal.deploy.doctor import preflight
from shoal.deploy.placement import memory
from shoal.deploy.placement.hardware import control_group_limits, memory_bytes
from shoal.deploy.placement.layout import Machine, choose_layout
from shoal.deploy.placement.setups import games_of, make_worker_setup, team_shares
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec
from shoal.envs.registry import make_env_spec
from shoal.learner.config import RecorderConfig
from shoal.learner.recorder import Recorder, _tensors
from shoal.policy.weights import flatten_weights

COPIES = 7
"""Of the weights: an actor's, the learner's five, and one on its way."""


def alone(config: Config) -> list[tuple[EnvSpec, int]]:
    """The shares of a run of one policy."""
    return [(make_env_spec(config.env.id), config.env.num_envs)]


def problems_of(tmp_path: Path, *arguments: str) -> list[str]:
    config, problems = load_config((), ["env.id=recall", "metrics.port=-1", *arguments])
    assert problems == []
    return preflight.check(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "start", "product"),
    [
        (("env.num_envs=1e12",), "env.num_envs", "1,000,000,000,000 slots (env.num_envs) x 32 steps"),
        (("env.num_envs=1e12", "mode=cluster"), "env.num_envs", "1,000,000,000,000 slots (env.num_envs) x 32 steps"),
        (
            ("actor.unroll_length=1e11",),
            "actor.unroll_length",
            "16 slots (env.num_envs) x 100,000,000,000 steps",
        ),
        # Small columns, but as many views of their rows.
        (("actor.unroll_length=1e10", "env.num_envs=1"), "actor.unroll_length", "27,939.7 GiB for its rows"),
        (("learner.batch_size=64e10",), "learner.batch_size", "(640,000,000,000 + "),
        (("learner.minibatches=999999937",), "learner.minibatches", "a batch of "),
        (("actor.num_actors=1e9",), "actor.num_actors", "the unrolls of 1,000,000,000 actors x 16 slots"),
        (("learner.num_learners=1e9",), "learner.num_learners", "the unrolls of 1,000,000,000 actors x 16 slots"),
    ],
)
def test_more_than_the_memory_is_refused(tmp_path: Path, arguments: tuple[str, ...], start: str, product: str) -> None:
    """Catches a run that ends in MemoryError, is killed, or computes its layout for ever."""
    [problem] = problems_of(tmp_path, *arguments)
    assert problem.startswith(f"{start}: ")
    assert product in problem
    assert "more than the memory of" in problem


def test_a_column_that_arrow_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an overflow of the schema on a machine with enough memory."""
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**60)
    config, _ = load_config((), ["env.id=recall", "actor.unroll_length=1e9", "env.num_envs=1"])
    [problem] = memory.check_memory(config, alone(config), None)
    assert problem.startswith("actor.unroll_length: 1,000,000,000 steps of a slot of recall are 5,000,000,005 numbers")


def test_what_fits_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a product that counts too much: refused is a run from one byte less than it holds."""
    config, _ = load_config((), ["env.id=recall", "mode=cluster", "env.num_envs=64", "actor.unroll_length=64"])
    spec = make_env_spec("recall")
    slot = memory.trajectory_spec(spec, 64).num_bytes(64)
    # The batch is held once more by the recorder while an update is made, and for each that it keeps.
    weights = memory.weight_bytes(config, spec)
    recorded = 4 * (slot + 3 * weights) + weights
    needed = 3 * slot + 64 * memory.ROW_BYTES + recorded + COPIES * weights
    for size, number in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(memory, "memory_bytes", lambda size=size: size)
        assert len(memory.check_memory(config, alone(config), None)) == number
    monkeypatch.undo()
    assert problems_of(tmp_path) == []


def test_the_recorder_is_counted_as_it_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is killed for copies of its batches, and copies that are counted where none are made."""
    learner = make_learner(small_policy(), batch_size=7)
    weights, batch = flatten_weights(learner.policy, 0).flat.nbytes, SMALL.num_bytes(7)
    recorder = Recorder(RecorderConfig(keep_updates=2, max_bytes=2**40), keeps_weights=True)
    for seed in range(4):
        recorder.begin(learner, random_batch(seed))
        learner.update(random_batch(seed))
        recorder.made("", {})
    config, _ = load_config((), ["env.id=recall", "mode=cluster", "env.num_envs=8", "actor.unroll_length=12"])

    def held(keep: int, most: int, learners: int = 1) -> int:
        chosen = dataclasses.replace(config.recorder, keep_updates=keep, max_bytes=most)
        return memory.recorder_bytes(dataclasses.replace(config, recorder=chosen), batch, learners, weights)

    one, counted = batch + 3 * weights, batch + 4 * weights
    different = {x.data_ptr(): x.nbytes for each in recorder.unwritten() for x in _tensors([each.shared, each.batch])}
    assert held(2, 2**40) - one == pytest.approx(sum(different.values()), rel=0.1)
    assert recorder.unwritten()[-1].num_bytes == pytest.approx(counted, rel=0.1)
    assert [held(3, 2**40), held(1, 2**40), held(3, counted)] == [n * one + weights for n in (4, 2, 2)]
    assert held(0, 2**40) == held(3, counted - 1) == 0
    assert held(1, 2**40, learners=7) == 2 * (7 * (batch // 7) + 3 * weights) + weights

    spec = make_env_spec("recall")
    slot, weights = memory.trajectory_spec(spec, 12).num_bytes(8), memory.weight_bytes(config, spec)
    assert weights == flatten_weights(make_worker_setup(config, spec, run_id="").make_policy(), 0).flat.nbytes
    needed = 3 * slot + 12 * memory.ROW_BYTES + 4 * (slot + 3 * weights) + (1 + COPIES) * weights
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed - 1)
    [problem] = memory.check_memory(config, alone(config), None)
    assert problem.startswith("recorder.keep_updates: ")
    assert "with the flight recorder (recorder.keep_updates=3) 0.0 GiB more" in problem
    with monkeypatch.context() as with_a_gpu:  # which has the copies
        with_a_gpu.setattr(memory, "device_name", lambda _: "cuda")
        assert memory.check_memory(config, alone(config), None) == []
    config = dataclasses.replace(config, recorder=dataclasses.replace(config.recorder, keep_updates=0))
    assert memory.check_memory(config, alone(config), None) == []


def test_frozen_versions_of_self_play_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is killed for the versions in its pool and in its actors."""
    pytest.importorskip("pettingzoo")
    settings = ["env.id=pettingzoo:turn_games:Nim", "mode=inline", "env.num_envs=6", "recorder.keep_updates=0"]
    without, _ = load_config((), settings)
    config, _ = load_config(
        (), [*settings, "self_play.share=0.5", "self_play.pool_size=64", "self_play.versions_at_once=3"]
    )
    spec = make_env_spec(without.env.id)
    weights, games = memory.weight_bytes(config, spec), games_of(config, spec)
    assert weights > 0
    assert games is not None
    row = memory.trajectory_spec(spec, 32).num_bytes(1) // 32
    frozen = memory.frozen_bytes(config, spec, row, 5, weights)
    agents = sum(1 for game in range(games.against_versions) for agent in range(spec.num_agents) if agent)
    assert frozen == 5 * (3 * weights + agents * row) + 64 * weights
    assert memory.frozen_bytes(without, spec, row, 5, weights) == 0
    needed = 3 * 6 * memory.trajectory_spec(spec, 32).num_bytes(1) + 32 * memory.ROW_BYTES + COPIES * weights
    monkeypatch.setattr(memory, "memory_bytes", lambda: needed)
    assert memory.check_memory(without, alone(without), None) == []
    [problem] = memory.check_memory(config, alone(config), None)
    assert problem.startswith("self_play.pool_size: ")


def test_every_one_of_several_policies_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of several policies that is not checked, or for one of them alone, for all with the spaces of one,
    or for a cluster not at all: refused is a run from one byte less than all hold together."""
    pytest.importorskip("pettingzoo")
    settings = (
        *("env.id=pettingzoo:team_games:teams", "env.num_envs=12", "actor.unroll_length=8", "metrics.port=-1"),
        *("policies.hunters.agents=[hunter_*]", "policies.runners.agents=[runner_*]", "learner.minibatches=2"),
    )
    for where, batch, actors in (("inline", 48, 3), ("local", 48, 3), ("cluster", 48, 1)):
        more = (f"mode={where}", "learner.batch_size=48", "actor.num_actors=3")
        config, problems = load_config((), [*settings, *more])
        assert problems == []
        layout = None if where == "cluster" else choose_layout(config, Machine(cores=2, accelerator=False))
        needed = 0
        # A hunter and two runners play each of the four games of an actor.
        for own, slots in zip(team_shares(config, layout).values(), (4, 8), strict=True):
            assert own.num_slots == slots
            slot = memory.trajectory_spec(own.spec, 8).num_bytes(1)
            policy = make_worker_setup(config, own.spec, run_id="").make_policy()
            weights = flatten_weights(policy, 0).flat.nbytes
            trajectories = (batch * slots // 12 + 2 * actors * slots) * slot + actors * 8 * memory.ROW_BYTES
            recorded = 4 * (batch * slots // 12 * slot + 3 * weights) + weights
            needed += trajectories + recorded + (actors - 1 + COPIES) * weights
        for size, number in ((needed, 0), (needed - 1, 1)):
            monkeypatch.setattr(memory, "memory_bytes", lambda size=size: size)
            found = preflight.check(config, tmp_path / "run")
            assert len(found) == number, found
            assert all(problem.startswith("recorder.keep_updates: a batch of 48 segments") for problem in found)
    monkeypatch.undo()
    [problem] = problems_of(tmp_path, *settings, "env.num_envs=12e12")
    assert problem.startswith("env.num_envs: an unroll is 12,000,000,000,000 slots")
    many = (*settings, "actor.num_actors=1e6", "actor.unroll_length=2", "learner.batch_size=12")
    [problem] = problems_of(tmp_path, *many)
    assert problem.startswith(
        "actor.num_actors: a batch of 12 segments, and the unrolls of 1,000,000 actors x 12 slots"
    )
    assert "with 1,000,006 copies of the weights (actors, gradients, moments, w0)" in problem
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**21)
    [problem] = problems_of(tmp_path, *many, "actor.num_actors=1")
    assert problem.startswith("policy: a batch of 12 segments")


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "1000\n"}, [1000]),
        ("0::/\n", {"memory.max": "2000\n"}, [2000]),
        ("5:cpu:/x\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "3000\n", "x/memory.max": "1\n"}, [3000]),
        ("5:cpu:/x\n", {}, []),
    ],
)
def test_limits_of_containers_count(tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]) -> None:
    """Catches the memory of the whole machine where a container has a part of it."""
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert control_group_limits(tmp_path / "root", tmp_path / "membership") == limits
    assert 2**28 < memory_bytes() < 2**60
