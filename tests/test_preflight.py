"""Unrolls and batches that no memory holds are refused before anything is allocated, with their product."""

from __future__ import annotations

from pathlib import Path

import pytest
from shoal.deploy.doctor import preflight
from shoal.deploy.placement import memory
from shoal.deploy.placement.hardware import control_group_limits, memory_bytes
from shoal.deploy.settings.load import load_config
from shoal.envs.registry import make_env_spec


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
    [problem] = memory.check_memory(config, make_env_spec("recall"), None)
    assert problem.startswith("actor.unroll_length: 1,000,000,000 steps of a slot of recall are 5,000,000,005 numbers")


def test_what_fits_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a product that counts too much: refused is a run from one byte less than it holds."""
    config, _ = load_config((), ["env.id=recall", "mode=cluster", "env.num_envs=64", "actor.unroll_length=64"])
    slot = memory.trajectory_spec(make_env_spec("recall"), 64).num_bytes(64)
    needed = 3 * slot + 64 * memory.ROW_BYTES
    for size, number in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(memory, "memory_bytes", lambda size=size: size)
        assert len(memory.check_memory(config, make_env_spec("recall"), None)) == number
    monkeypatch.undo()
    assert problems_of(tmp_path) == []


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
