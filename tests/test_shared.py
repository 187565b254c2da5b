"""Learners that also act, through the command line: the same weights in every mode, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from service import SHARED, alive, descendants, learner_processes, read_summary, start_shoal, wait_for

from deploy.cli import main


def _weights(run: Path, *settings: str) -> str:
    assert main(["train", *SHARED, f"run_dir={run}", "total_env_steps=3000", *settings]) == 0
    summary = read_summary(run)
    assert summary["policy_lag"] == {"mean": 0, "max": 0}
    assert summary["ledger"]["dropped"] == {}
    found: str = summary["weights_sha256"]
    return found


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("settings", [[], ["learner.epochs=2", "learner.minibatches=2", "actor.num_actors=4"]])
def test_processes_change_nothing(tmp_path: Path, settings: list[str]) -> None:
    """A learner that has another seed, another share or another order of its segments than it has alone."""
    settings = [*settings, "learner.num_learners=2"]
    local = _weights(tmp_path / "local", "mode=local", *settings)
    assert local == _weights(tmp_path / "inline", "mode=inline", *settings)


def _start(tmp_path: Path, *settings: str):  # type: ignore[no-untyped-def]
    return start_shoal(
        *("train", *SHARED, "mode=local", "learner.num_learners=3", "learner.batch_size=48", "run_dir=run"),
        *("total_env_steps=1000000000", "max_seconds=150", "checkpoint.every_updates=20", *settings),
        cwd=tmp_path,
    )


def _newest(tmp_path: Path) -> int:
    return max((int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("0*")), default=0)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("blow", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_learner_that_dies_or_hangs_is_replaced(tmp_path: Path, blow: signal.Signals) -> None:
    """A run that ends, or waits for ever, with one of its learners; one that goes on with other weights than the
    survivors; steps that are lost from the books."""
    process = _start(tmp_path, "actor.unroll_timeout_seconds=5")
    wait_for(lambda: _newest(tmp_path), process=process)
    children = descendants(process.pid)
    victim, survivor = learner_processes(process.pid)
    os.kill(victim, blow)
    wait_for(lambda: len(set(learner_processes(process.pid)) - {victim}) == 2, process=process)
    assert survivor in learner_processes(process.pid)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 60, process=process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "different weights" not in (tmp_path / "run" / "run.log").read_text()
    summary = read_summary(tmp_path / "run")
    assert summary["actor_restarts"] == 1
    assert summary["lost_unrolls"] == 2  # its part of the update
    assert set(summary["ledger"]["dropped"]) <= {"learner_lost"}
    wait_for(lambda: not any(map(alive, children)), seconds=30)


@pytest.mark.usefixtures("no_ray")
def test_all_learners_beside_it_may_die_at_once(tmp_path: Path) -> None:
    """A run that cannot go on alone until others are there again."""
    process = _start(tmp_path)
    wait_for(lambda: _newest(tmp_path), process=process)
    before = learner_processes(process.pid)
    for victim in before:
        os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(set(learner_processes(process.pid)) - set(before)) == 2, process=process)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 60, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert read_summary(tmp_path / "run")["actor_restarts"] == 2
