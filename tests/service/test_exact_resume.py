"""Runs in one process that are interrupted end with the weights of the same runs left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
from shoal.deploy.cli import BENCHMARKS, main
from shoal.learner.checked_files import fingerprint
from shoal.learner.checkpoint import find_checkpoint
from shoal.learner.plain_file import load_plain, save_plain


@pytest.mark.timeout(1200)
def test_a_killed_run_ends_as_one_left_alone(tmp_path: Path) -> None:
    """Catches anything that decides the future and is not in the checkpoint, is of another moment, or is counted
    twice: weights, ledger, episodes and mean return are compared after kills at any time, also during a write."""
    program = [
        sys.executable,
        str(BENCHMARKS / "interrupted.py"),
        "--kills",
        "12",
        "--directory",
        str(tmp_path),
        "--json",
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 12
    assert found["kills during a write"] >= 3, found


def play(run: Path, steps: int, *settings: str) -> dict[str, Any]:
    """A session up to so many steps; its summary."""
    assert main(["train", *kills.SMALL, f"run_dir={run}", *settings, f"total_env_steps={steps}"]) == 0
    return kills.summary(run)


def said(run: Path) -> str:
    return (run / "run.log").read_text()


def test_a_run_that_was_told_to_go_on_is_one_run(tmp_path: Path) -> None:
    """Catches a session whose environments begin anew after a clean end, a fork that plays its parent's episodes."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    # By default the learning rate goes by the steps that a run is to have in all.
    recall = ("env.id=recall", "learner.schedules.learning_rate={kind: constant}")
    play(run, 100, *recall)
    went_on = play(run, 200, *recall)
    assert "all 4 slots go on where they were" in said(run)
    assert went_on["slots_begun_anew"] == 0
    expected = play(alone, 200, *recall)
    for name in kills.EXACT:
        assert went_on[name] == expected[name], name
    forked = play(tmp_path / "fork", 300, *recall, f"resume={run}")
    assert forked["slots_begun_anew"] == 4
    assert forked["ledger"]["trained"] >= 300


def test_slots_that_cannot_go_on_are_counted_and_said(tmp_path: Path) -> None:
    """Catches an environment that hides its state and is resumed with another one without a word, or ends the run."""
    run, hidden = tmp_path / "run", "env.id=stateful_envs:HiddenWalk-v0"
    play(run, 100, hidden)
    summary = play(run, 200, hidden)
    assert summary["slots_begun_anew"] == 4
    assert summary["books_balance"]
    assert summary["ledger"]["dropped"] == {}
    (line,) = [line for line in said(run).splitlines() if "slots begin an episode" in line]
    assert "4 of 4 slots begin an episode with a seed of their own" in line
    assert "HiddenWalk._place is a builtins.generator" in line
    play(run, 300, hidden, "env.num_envs=2", "learner.batch_size=4")
    assert "the environments begin anew: settings of env are others" in said(run)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_begins_anew_has_no_faults_before(tmp_path: Path, vectorization: str) -> None:
    """Catches a resume that ends with the first error of a new environment, because the one before it had failed."""
    run, settings = tmp_path / "run", ("env.id=stateful_envs:BreakingWalk-v0", f"env.vectorization={vectorization}")
    play(run, 100, *settings)

    def faulty_before(rollouts: dict[str, Any]) -> None:
        for slot in rollouts["pool"]["0"]["env"]["slots"]:
            slot["counts"][2:] = [0, 2]

    _change(run, faulty_before)
    summary = play(run, 200, *settings)
    assert (summary["slots_begun_anew"], summary["actor_restarts"]) == (4, 0)
    assert summary["books_balance"]
    assert "no display" in said(run)
    assert "4 of 4 slots begin an episode with a seed of their own" in said(run)


def _change(run: Path, change: Callable[[dict[str, Any]], None] | None) -> None:
    """Put another state of the environments into the latest checkpoint; None: no state at all."""
    path = find_checkpoint(run).path
    file = path / "rollouts.npz"
    if change is None:
        file.write_bytes(b"no archive")
    else:
        rollouts = load_plain(file)
        change(rollouts)
        save_plain(file, rollouts)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {file.name: fingerprint(file)}))


def _one_slot(rollouts: dict[str, Any]) -> None:
    rollouts["pool"]["0"]["env"]["slots"][1]["env"][-1]["attributes"]["state"] = np.zeros(7)


def _memory(rollouts: dict[str, Any]) -> None:
    rollouts["pool"]["0"]["memory"]["h"] = np.zeros(3)


def _queue(rollouts: dict[str, Any]) -> None:
    rollouts["queue"]["waiting"] = [{"payload": np.zeros(9, np.uint8), "order": [0, 0], "latest_version": None}]


@pytest.mark.parametrize(
    ("damage", "begun", "words"),
    [
        (_one_slot, 1, "CartPoleEnv.state is float64 [7], must be"),
        (_memory, 4, "h must be float32"),
        (_queue, 0, "unrolls that waited for their update are lost"),
        (None, 4, "the environments begin anew: their state in"),
    ],
)
def test_a_damaged_state_costs_what_it_is_of(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None] | None, begun: int, words: str
) -> None:
    """Catches a state that is believed or ends the run, though weights and ledger are sound."""
    run = tmp_path / "run"
    play(run, 100, "env.id=CartPole-v1")
    _change(run, damage)
    summary = play(run, 200, "env.id=CartPole-v1")
    assert summary["slots_begun_anew"] == begun
    assert summary["books_balance"]
    assert summary["env_steps"] >= 200
    assert words in said(run)
