"""Learners that also act, through the command line: the same weights in every mode, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service import (
    SHARED,
    actor_processes,
    alive,
    descendants,
    learner_processes,
    make_setup,
    read_summary,
    start_shoal,
    ups,
    wait_for,
)
from shoal.actors.rollout import RolloutWorker
from shoal.deploy.cli import main
from shoal.deploy.cluster.learner_actor import LearnerActor
from shoal.deploy.placement.layout import Share
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.envs.boundary import EnvironmentFault
from shoal.envs.registry import make_env_spec
from shoal.learner.config import LearnerConfig, RecorderConfig
from shoal.learner.group import LearnerLost
from shoal.learner.learner import NonFiniteUpdate
from shoal.learner.learner_worker import Lost, Skipped, StepResult, Trained
from shoal.learner.learners import reconcile
from shoal.learner.ledger import Ledger
from shoal.learner.schedules import scheduled_settings
from shoal.policy.config import Initialization
from shoal.policy.weights import Weights


def _weights(run: Path, *settings: str) -> str:
    assert main(["train", *SHARED, f"run_dir={run}", "total_env_steps=3000", *settings]) == 0
    summary = read_summary(run)
    assert summary["policy_lag"] == {"mean": 0, "max": 0}
    # Rollout actors are already at the next batch when the run ends.
    assert set(summary["ledger"]["dropped"]) <= ({"shutdown"} if "placement=disaggregated" in settings else set())
    found: str = summary["weights_sha256"]
    return found


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "settings",
    [
        [],
        [
            *("learner.epochs=2", "learner.minibatches=2", "actor.num_actors=4", "learner.target_kl=1e-5"),
            "learner.schedules={learning_rate: {kind: cosine}, clip_coef: {kind: linear, end: 0.01}}",
        ],
        # Each fed by two rollout actors.
        ["placement=disaggregated", "actor.num_actors=4", "actor.max_policy_lag=0", "learner.batch_size=32"],
    ],
    ids=["act", "act-epochs", "fed"],
)
def test_processes_change_nothing(tmp_path: Path, settings: list[str]) -> None:
    """A learner that has another seed, another share or another order of its segments than it has alone, or that counts
    the steps of its schedules by itself."""
    settings = [*settings, "learner.num_learners=2"]
    local = _weights(tmp_path / "local", "mode=local", *settings)
    assert local == _weights(tmp_path / "inline", "mode=inline", *settings)


def _step(*, sampled: int, trained: int = 0, lost: bool = False, refused: bool = False) -> StepResult:
    reason = "learner_lost" if lost else "non_finite"
    outcome: Trained | Skipped | Lost = Trained(
        all_env_steps=0,
        terms={},
        optimizer_steps=1,
        scheduled=scheduled_settings(LearnerConfig(), 0, None),
        staleness={},
        gradient_norms={},
    )
    if lost or refused:
        outcome = Lost(error=LearnerLost()) if lost else Skipped(error=NonFiniteUpdate())
    return StepResult(
        outcome=outcome,
        ledger=Ledger(sampled=sampled, trained=trained, dropped=Counter({reason: sampled} if lost or refused else {})),
        reports=(),
        log_prob_errors=(),
        weights_hash="",
    )


@pytest.mark.parametrize(
    ("own", "other", "books"),
    [
        ({"trained": 5}, {"trained": 7}, Ledger(sampled=7, trained=7)),
        ({"refused": True}, {"refused": True}, Ledger(sampled=7, dropped=Counter(non_finite=7))),
        ({"lost": True}, {"lost": True}, Ledger(sampled=7, dropped=Counter(learner_lost=7))),
        ({"lost": True}, {"trained": 7}, Ledger(sampled=7, dropped=Counter(learner_lost=7))),
        ({"trained": 5}, {"lost": True}, Ledger(sampled=7, trained=7)),
        ({"refused": True}, {"lost": True}, Ledger(sampled=7, dropped=Counter(non_finite=7))),
    ],
)
def test_one_learner_says_what_became_of_an_update(own: dict[str, Any], other: dict[str, Any], books: Ledger) -> None:
    """Steps that are trained for one learner and dropped for another: in the books twice, or not as they ended."""
    assert reconcile(_step(sampled=5, **own), _step(sampled=7, **other)) == books


def test_a_worker_that_fails_in_a_learners_process_is_replaced_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that ends a learner; a replacement that nobody hears of, or that acts as its predecessor did."""
    worker = make_setup("recall", num_envs=8)
    setup = LearnerSetup(
        worker=worker,
        learner=LearnerConfig(device="cpu"),
        total_env_steps=1000,
        initialization=Initialization(),
        env=make_env_spec("recall"),
        max_policy_lag=0,
        max_consecutive_failures=2,
        seed=0,
        recorder=RecorderConfig(),
    )
    share = Share(actors=range(3, 4), batch_size=16, num_shards=1, first_shard=1, num_threads=1)
    learner = LearnerActor(setup, share, restart_index=2)
    learner.build()
    learner._learner.publish()
    calls = iter([False, True])  # the second unroll of the first step

    def rollout(self: RolloutWorker, weights: Weights) -> np.ndarray:
        if next(calls, False):
            raise EnvironmentFault("broken")
        return whole(self, weights)

    whole = RolloutWorker.rollout
    monkeypatch.setattr(RolloutWorker, "rollout", rollout)
    result = learner.step(None)
    assert result.replaced == (("error", "the worker of actor 3 is replaced: EnvironmentFault: broken"),)
    assert result.lost_unrolls == 1
    assert result.step.ledger.sampled == result.step.ledger.trained > 0
    assert learner.step(None).replaced == ()
    assert learner._pool._restart_indices == {3: (2 << 16) + 1}
    calls = iter([True, True])
    with pytest.raises(EnvironmentFault):
        learner.step(None)


def _start(tmp_path: Path, *settings: str) -> subprocess.Popen[str]:
    return start_shoal(
        *("train", *SHARED, "mode=local", "learner.num_learners=3", "learner.batch_size=48", "run_dir=run"),
        *("total_env_steps=1000000000", "max_seconds=800", "checkpoint.every_updates=5", *settings),
        cwd=tmp_path,
    )


def _interrupt(process: subprocess.Popen[str], tmp_path: Path) -> dict[str, Any]:
    """Ctrl-C, which a terminal sends to all processes; the summary of a run that ended cleanly."""
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "different weights" not in (tmp_path / "run" / "run.log").read_text()
    return read_summary(tmp_path / "run")


def _newest(tmp_path: Path) -> int:
    return max((int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("0*")), default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_learner_that_dies_or_hangs_is_replaced(tmp_path: Path, blow: signal.Signals) -> None:
    """A run that ends, or waits for ever, with one of its learners; one that goes on with other weights than the
    survivors; steps that are lost from the books."""
    process = _start(tmp_path, "actor.unroll_timeout_seconds=15")
    wait_for(lambda: _newest(tmp_path) and ups(tmp_path / "run") == 2, process=process)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 5, process=process)  # together
    children = descendants(process.pid)
    victim, survivor = learner_processes(process.pid)
    os.kill(victim, blow)
    wait_for(lambda: len(set(learner_processes(process.pid)) - {victim}) == 2, process=process)
    assert survivor in learner_processes(process.pid)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 20, process=process)
    summary = _interrupt(process, tmp_path)
    assert summary["actor_restarts"] == summary["actor_recovery_seconds"]["count"] == 1
    assert summary["lost_unrolls"] == 2  # its part of the update
    assert set(summary["ledger"]["dropped"]) <= {"learner_lost"}
    wait_for(lambda: not any(map(alive, children)), seconds=200)


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
def test_learners_that_are_fed_lose_actors_and_each_other(tmp_path: Path) -> None:
    """Unrolls that wait at a learner that dies, and fall out of the books; its actors, left without an owner; a dead
    actor of another learner that nobody replaces or counts."""
    fed = ("placement=disaggregated", "learner.num_learners=2", "actor.num_actors=4", "learner.batch_size=32")
    process = _start(tmp_path, *fed, "actor.unroll_timeout_seconds=60")
    wait_for(lambda: _newest(tmp_path) and len(actor_processes(process.pid)) == 4, process=process)
    children = descendants(process.pid)
    for _ in range(2):  # whoever they belong to
        victim = actor_processes(process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda gone=victim: len(set(actor_processes(process.pid)) - {gone}) == 4, process=process)
    [learner] = learner_processes(process.pid)
    os.kill(learner, signal.SIGKILL)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 20, process=process)  # alone
    wait_for(lambda: len(set(learner_processes(process.pid)) - {learner}) == 1, process=process)
    wait_for(lambda: len(actor_processes(process.pid)) == 4, process=process)
    at = _newest(tmp_path)
    wait_for(lambda: _newest(tmp_path) > at + 20, process=process)
    summary = _interrupt(process, tmp_path)
    assert summary["actor_restarts"] >= 3
    assert set(summary["ledger"]["dropped"]) <= {"learner_lost", "shutdown", "stale"}
    wait_for(lambda: not any(map(alive, children)), seconds=200)


@pytest.mark.slow
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
    wait_for(lambda: _newest(tmp_path) > at + 20, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert read_summary(tmp_path / "run")["actor_restarts"] == 2
