"""What ``shoal bench soak`` makes of its readings."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from shoal.deploy.cli import BENCHMARKS
from shoal.deploy.settings.load import load_config


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    """The benchmark, which imports what lies beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    try:
        specification = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.startswith("suite"):
                del sys.modules[name]


def samples(minutes: int, **curves: np.ndarray) -> list[dict[str, Any]]:
    """A reading every five seconds; ``curves`` are of the part ``actors``."""
    count = minutes * 12
    return [
        {
            "seconds": 5.0 * i,
            "steps": 100.0 * i,
            "parts": {"actors": {name: float(curve[i]) for name, curve in curves.items()}},
            "shared_memory_mib": 1.0,
            "run_dir_mib": 2.0,
            "scrape_ms": 3.0,
        }
        for i in range(count)
    ]


def test_a_leak_is_found_under_noise(soak: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a fit that noise hides a leak from, or that takes noise, the growth at the start or a step for one."""
    rng, time = np.random.default_rng(0), np.arange(60 * 12) / 720  # hours
    noise = rng.normal(0, 20, time.size)
    leak = soak.report("leak", samples(60, memory_mib=400 + 60 * time + noise), 0)
    assert leak["slopes_per_hour"]["actors memory_mib"] == pytest.approx(60, rel=0.2)
    assert leak["failed"]
    assert "GROWS" in capsys.readouterr().out
    start = 300 * np.minimum(time / 0.15, 1)  # into its size in nine minutes
    step = np.where(time > 0.9, 50, 0)  # once, late
    for healthy in (400 + noise, 400 + start + noise, 400 + step + noise):
        found = soak.report("healthy", samples(60, memory_mib=healthy, descriptors=np.full(time.size, 50.0)), 0)
        assert not found["failed"], found
        assert "GROWS" not in capsys.readouterr().out


def test_a_machine_that_others_keep_busy_is_no_slower_scrape(soak: ModuleType) -> None:
    """Catches a soak that fails because other programs ran in its second half, and one that calls a page that grows the
    machine's."""
    hours = np.arange(60 * 12) / 720
    readings = samples(60, memory_mib=np.full(hours.size, 400.0))
    busy = np.where(hours > 0.5, 1.5, 1.0)
    for grows, failed in ((0.0, False), (20.0, True)):
        for reading, hour, slowness in zip(readings, hours, busy, strict=True):
            reading |= {"scrape_ms": (12 + grows * hour) * slowness, "reference_ms": 0.8 * slowness}
        assert soak.report("busy", readings, 143)["failed"] == failed
    for reading in readings:
        del reading["reference_ms"]
    assert soak.report("as it was read", readings, 143)["failed"]


def test_a_run_that_failed_is_not_healthy(soak: ModuleType) -> None:
    """Catches a soak that only looks at slopes: a run that crashed uses no memory at all."""
    readings = samples(5, memory_mib=np.full(60, 400.0))
    assert soak.report("crashed", readings, 1)["failed"]
    assert not soak.report("stopped", readings, 143)["failed"]


def test_runs_go_on_until_they_are_stopped(soak: ModuleType) -> None:
    """Catches a recipe with an end of its own: an hour of soak that is four minutes."""
    for name, words in soak.RUNS.items():
        files = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        arguments = [word for word in words if "=" in word]
        config, problems = load_config(files, [*arguments, *soak.SETTINGS])
        assert (problems, config.max_seconds) == ([], 0), name
        assert config.total_env_steps >= 10**12, name


def test_a_run_that_ends_by_itself_is_none(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches slopes of the minutes that a run lasted, told as those of an hour."""
    monkeypatch.setattr(soak, "SETTINGS", ("mode=inline", "metrics.port=0", "run_dir=run", "max_seconds=1"))
    settings = ("env.id=recall", "env.num_envs=4", "learner.num_threads=1", "evaluation.random_seconds=0")
    with pytest.raises(RuntimeError, match=r"ended by itself: exit code 0, see .*short\.log"):
        soak.soak("short", settings, 600, tmp_path)


def test_processes_are_told_apart(soak: ModuleType) -> None:
    """Catches parts that are named after nothing, or processes that are left out."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        parts = soak.read_processes(os.getpid())
        assert parts["command"]["processes"] >= 2
        assert parts["command"]["memory_mib"] > 50
        assert parts["command"]["descriptors"] >= 3
    finally:
        child.communicate()
    for command, part in (
        ("ray::RolloutActor.rollout", "actors"),
        ("ray::LearnerActor.update", "learners"),
        ("/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/r", "raylet"),
        ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "gcs_server"),
        ("/x/python -u /x/ray/_private/log_monitor.py", "Ray's others"),
        ("/x/python -c from multiprocessing.spawn import spawn_main", "evaluation"),
    ):
        assert soak.part_of(command) == part
