"""The training loop with several policies: its rounds, what ends them, and what schedules go by."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shoal.deploy.evaluation.evaluator import Rounds
from shoal.deploy.training.prepared_run import PreparedRun, prepare
from shoal.deploy.training.worker_group import start_workers
from shoal.learner.training_loop import Limits, Observer, Saving, TrainedPolicy, train
from team_setups import configured


class Nobody:
    def updated(self, policy: str, result: Any) -> None: ...

    def saved(self, path: Path) -> None: ...


class Loop:
    """The policies of ``team_games`` in one process; ``stop`` ends ``train``."""

    def __init__(self, runs: tuple[PreparedRun, ...], policies: list[TrainedPolicy], place: Path) -> None:
        self.runs, self.policies, self.stop, self._place = runs, policies, threading.Event(), place
        self.saved: list[list[int]] = []

    @property
    def versions(self) -> list[int]:
        return [run.learner.learner.policy_version for run in self.runs]

    def write(self) -> Path:
        self.saved.append(self.versions)
        return self._place

    def train(self, env_steps: int, checkpoint_every: int = 0, observer: Observer | None = None) -> None:
        limits = Limits(total_env_steps=env_steps, checkpoint_every=checkpoint_every)
        train(self.policies, Saving(write=self.write), limits, self.stop, observer or Nobody())


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    runs = prepare(configured("total_env_steps=2000", "learner.desired_kl=0"), tmp_path / "run", None)
    with start_workers(runs) as workers:
        policies = [
            TrainedPolicy(name=run.policy, learners=learners, statistics=run.statistics, updates=run.updates)
            for run, learners in zip(runs, workers.learners, strict=True)
        ]
        yield Loop(runs, policies, tmp_path)
        workers.close()
    for run in runs:
        run.learner.learner.close()


def test_a_round_that_began_is_ended(loop: Loop) -> None:
    """Catches a stop in mid-round that leaves a policy untrained with games that another has learned from."""
    hunters = loop.runs[0].learner
    published, publish = [], hunters.publish_to

    def stop_in_the_second_round(weights: Any) -> Any:
        published.append(weights.policy_version)
        if weights.policy_version == 2:
            loop.stop.set()
        return publish(weights)

    hunters.publish_to = stop_in_the_second_round
    loop.train(10**6)
    assert published == [0, 1, 2]
    assert loop.versions == [2, 2]
    assert loop.saved == [[2, 2]]


def test_what_is_evaluated_is_of_one_round(loop: Loop) -> None:
    """Catches an evaluation of policies of which some are an update ahead, and weights with the steps of others."""
    rounds = Rounds({run.policy: run.learner for run in loop.runs}, Nobody())
    runners, seen = loop.runs[1].learner, []
    publish = runners.publish_to

    def look_while_the_hunters_are_ahead(weights: Any) -> Any:
        seen.append((loop.versions[0], [taken.weights.policy_version for taken in rounds.newest.values()]))
        return publish(weights)

    runners.publish_to = look_while_the_hunters_are_ahead
    loop.train(600, observer=rounds)
    assert seen == [(0, []), (1, []), *((round_, [round_ - 1] * 2) for round_ in range(2, loop.versions[0] + 1))]
    assert len(seen) > 3
    assert list(rounds.newest) == ["hunters", "runners"]
    for run, taken in zip(loop.runs, rounds.newest.values(), strict=True):
        assert taken.weights.policy_version == run.learner.learner.policy_version
        assert taken.env_steps == run.learner.queue.ledger.trained > 0


def test_schedules_go_by_the_steps_of_all(loop: Loop) -> None:
    """Catches learning rates by the steps of one policy, and by those of a round that is under way."""
    loop.train(1000, checkpoint_every=1)
    trained = [run.learner.queue.ledger.trained for run in loop.runs]
    assert sum(trained) >= 1000
    assert trained[0] != trained[1]
    rates = {run.learner.learner._scheduled.learning_rate for run in loop.runs}
    [rate] = rates
    # Each round trained as many steps as another: that of the last is before it.
    rounds = loop.versions[0]
    before = sum(trained) * (rounds - 1) / rounds
    assert rate == pytest.approx(1e-3 * (1 - before / 2000), rel=0.05)
    assert loop.saved == [[version, version] for version in range(1, rounds + 1)]
