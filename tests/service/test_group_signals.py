"""A signal to the whole process group of a run, as a closed terminal, ``scancel`` and systemd send it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from service import SMALL, descendants, shoal, start_shoal, wait_for
from shoal.learner.checkpoint import find_checkpoint

RUN = [
    *(setting for setting in SMALL if not setting.startswith("env.")),
    *("env.id=CartPole-v1", "env.num_envs=4", "env.vectorization=async", "evaluation.random_seconds=0"),
]


def trained(run: Path) -> bool:
    """Whether a line of its history says so."""
    history = run / "metrics.jsonl"
    *lines, _ = history.read_text().split("\n") if history.exists() else [""]  # the last one may be half a line
    return bool(lines) and json.loads(lines[-1])["policy_version"] > 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_all_processes_of_a_run_saves(tmp_path: Path, number: signal.Signals) -> None:
    """Catches environments' processes that end before the run has asked for their state: its last save fails, and the
    updates since the one before are lost."""
    run = tmp_path / "run"
    settings = ["train", *RUN, "mode=inline", f"run_dir={run}"]
    process = start_shoal(*settings, "total_env_steps=1000000000", "log.every_seconds=0.2", cwd=tmp_path)
    wait_for(lambda: trained(run), process=process)
    assert not list((run / "checkpoints").glob("0*"))
    workers = descendants(process.pid)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, out
    assert "Interrupted; saved." in out
    assert "Traceback" not in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["interrupted_by"] == number.name
    assert summary["actor_restarts"] == 0
    assert find_checkpoint(run).policy_version == summary["policy_version"] > 0
    wait_for(lambda: not any(Path(f"/proc/{worker}/exe").exists() for worker in workers))
    went_on = shoal(*settings, f"total_env_steps={summary['env_steps'] + 1000}", cwd=tmp_path)
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    assert "all 4 slots go on where they were" in (run / "run.log").read_text()


def test_a_signal_to_the_group_of_a_local_run_saves(tmp_path: Path) -> None:
    """Catches a run that ends with its Ray, which the signal reaches too, instead of saving."""
    number = signal.SIGTERM
    run = tmp_path / "run"
    settings = ["train", *RUN, "mode=local", "actor.num_actors=1", f"run_dir={run}"]
    process = start_shoal(*settings, "total_env_steps=1000000000", "log.every_seconds=0.2", cwd=tmp_path)
    wait_for(lambda: trained(run), process=process)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, out
    assert "Interrupted; saved." in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["actor_restarts"] == 0
    assert find_checkpoint(run).policy_version == summary["policy_version"] > 0
