"""What a run of several policies tells of itself: what limits it, what is late, whose messages are whose, and where
trackers get the lines of each."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from shoal.deploy.monitoring import sinks as sinks_module
from shoal.deploy.monitoring.bottleneck import BottleneckMonitor
from shoal.deploy.monitoring.sinks import LoggedRun, Sink
from shoal.deploy.placement.layout import Machine, choose_layout, unrolls_that_divide
from shoal.deploy.placement.setups import team_shares
from shoal.deploy.records.evaluations import Evaluations
from shoal.deploy.records.run_dir import CannotStart
from shoal.deploy.training.prepared_run import prepare
from shoal.deploy.training.progress import Progress
from shoal.deploy.training.run import _summaries
from shoal.deploy.training.run import run as run_to_the_end
from shoal.learner.statistics import RunStatistics
from team_games import TeamGame
from team_setups import Setups, configured

# A run that waits for its environments: the policy that is updated first waits, and the unrolls of the other are there.
FIRST = {"wait": 8.0, "update": 0.5, "actor_env": 3.0, "actor_policy": 0.5}
SECOND = {"wait": 0.0, "update": 1.5, "actor_env": 6.0, "actor_policy": 0.5}


def spend(statistics: RunStatistics, stages: Mapping[str, float]) -> None:
    for stage, seconds in stages.items():
        statistics.stage_seconds[stage] += seconds


def test_several_policies_have_one_bottleneck(tmp_path: Path) -> None:
    """Catches a policy that blames its updates, because it waits while the first one does, and whose shares leave out
    what the others take."""
    runs = prepare(configured(), tmp_path / "run", None)
    fed = BottleneckMonitor([run.statistics for run in runs], acting=False, num_processes=1)
    for run, stages in zip(runs, (FIRST, SECOND), strict=True):
        spend(run.statistics, stages)
    found = fed.whole()
    assert found is not None
    assert found.stage == "environment"
    # 9 of the 10 seconds that both have taken; 8 of them were waited for.
    assert found.sentence.startswith("stepping environments takes 90% of the actors' time, and the learner waits for")
    assert "waits for them 80% of its own" in found.sentence
    # Every policy's view is that of the run.
    assert len({run.bottleneck.whole() for run in runs}) == 1
    assert len({run.bottleneck.now() for run in runs}) == 1
    for run in runs:
        run.run_dir.mkdir(parents=True)
    summary = _summaries(runs, tmp_path / "run", {run.policy: Evaluations() for run in runs})
    assert summary["limit"]["stage"] == "environment"


def test_a_stall_of_any_policy_is_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a run that hangs in the second policy's update and shows nothing, because the first one has none."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    runs = prepare(configured(), tmp_path / "run", None)
    spend(runs[0].statistics, FIRST)
    monitor = runs[0].bottleneck
    with runs[1].learner.clock.mark("update"):
        for _ in range(60):
            now[0] += 1
            found = monitor.now()
    assert found is not None
    assert found.sentence.startswith("an update has been under way for 60 s")


def test_the_bottleneck_is_said_once_and_lines_name_their_policy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a bottleneck that is said once for every policy, or as that of one; and lines that may be of either."""
    runs = prepare(configured(), tmp_path / "run", None)
    shown = [
        Progress(
            run.statistics,
            run.learner.queue,
            NoPool(),
            run.bottleneck,
            run.learning,
            total_env_steps=10,
            share_trained=lambda: 0.5,
            policy=run.policy,
            leads=run is runs[0],
        )
        for run in runs
    ]
    for run, stages in zip(runs, (FIRST, SECOND), strict=True):
        spend(run.statistics, stages)
    monkeypatch.setattr(RunStatistics, "seconds", property(lambda self: 100.0))
    monkeypatch.setattr("shoal.deploy.training.progress.PLAIN_LINE_SECONDS", 0.0)
    with contextlib.ExitStack() as stack:
        for progress in shown:
            stack.enter_context(progress)
        deadline = time.monotonic() + 30
        out = ""
        while not all(f"{run.policy}: [" in out for run in runs) and time.monotonic() < deadline:
            time.sleep(0.05)
            out += capsys.readouterr().out
    lines = (out + capsys.readouterr().out).splitlines()
    assert len([line for line in lines if line.startswith("bottleneck: stepping environments")]) == 1
    assert not [line for line in lines if not line.startswith(("bottleneck: ", "hunters: ", "runners: "))]


class NoPool:
    num_alive = 1
    restarts: Mapping[str, int] = {}


def test_the_time_of_the_games_is_every_teams_by_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches games whose time is that of the first policy alone, lost, or counted for each; and time that an unroll
    takes over from the one before. The clock goes on in games only, a second a step."""
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0 + seconds[0])
    step = TeamGame.step

    def counted(self: TeamGame, actions: dict[str, Any]) -> Any:
        seconds[0] += 1
        return step(self, actions)

    monkeypatch.setattr(TeamGame, "step", counted)
    made = Setups()
    unrolls = made.rollouts(2)
    total = 0.0
    for parts in unrolls:
        told = [
            worker.queue.read(part).header.statistics for worker, part in zip(made.workers.values(), parts, strict=True)
        ]
        spent = [statistics["env_seconds"] for statistics in told]
        # Four of twelve slots, and eight.
        assert spent[1] == pytest.approx(2 * spent[0])
        assert [statistics["policy_seconds"] for statistics in told] == [0.0, 0.0]
        total += sum(spent)
    assert total == pytest.approx(seconds[0])
    assert total > 40


def test_nothing_is_late_where_everything_is_trained() -> None:
    """Catches unrolls that are called too late to be trained, and are trained: several policies drop none."""
    made = Setups()
    for worker in made.workers.values():
        worker.publish()
    assert made.queues.admit([0]) is not None
    for worker in made.workers.values():
        for _ in range(9):
            worker.learner.policy_version += 1
            worker.publish()
    for worker in made.workers.values():
        assert worker.queue.lags() == [9]
        assert worker.queue.max_policy_lag < 9
        assert worker.queue.late() == 0


def test_a_refused_delivery_is_told_once_with_its_policy(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a warning for every policy, none of which says whose trajectory was broken."""
    made = Setups()
    for worker in made.workers.values():
        worker.publish()
    actor = made.team.make_worker(0, 0)
    admitted = made.queues.admit([0])
    assert admitted is not None
    parts = actor.rollout(admitted[1])
    broken = parts[1].copy()
    broken[len(broken) // 2] ^= 1
    caplog.clear()
    why = made.queues.deliver(0, [parts[0], broken])
    [record] = caplog.records
    assert record.getMessage() == f"a delivery was refused: {why}"
    assert why is not None
    assert why.startswith("runners: ")
    caplog.clear()
    assert made.queues.deliver(0, parts) == "actor 0 delivered an unroll that it was never admitted to"
    assert len(caplog.records) == 1
    assert [worker.queue.refused["malformed"] for worker in made.workers.values()] == [2, 2]
    actor.close()


def test_warnings_about_observations_name_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a column number of which nobody can say whose observations it is in."""
    made = Setups('env.kwargs={"poisoned": "runner", "poison": 700}')
    unrolls = made.rollouts(1)
    hunters, runners = (
        worker.queue.read(part).header.statistics["remarks"]
        for worker, part in zip(made.workers.values(), unrolls[0], strict=True)
    )
    assert "out_of_bounds" not in hunters
    assert runners["out_of_bounds"][1].startswith("runners: obs is out of its space at flat index ")
    caplog.clear()
    for worker in made.workers.values():
        statistics = worker.learner.statistics.observations
        assert statistics is not None
        sums = torch.zeros(1 + 3 * len(statistics.state_dict()["mean"]), dtype=torch.float64)
        sums[0] = 20_000
        statistics.end_update(sums)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(" obs[0]")[0] for text in said] == ["hunters: observations", "runners: observations"]


def test_no_policy_has_the_seed_of_another_run() -> None:
    """Catches runs that are compared over seeds and share the weights that a policy begins with; and a first policy
    that no longer begins with those of its seed."""
    config = configured()
    shares = list(team_shares(config).values())
    found = [own.seed(seed) for own in shares for seed in range(1000)]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)
    assert [shares[0].seed(seed) for seed in (0, 7, 2**63 - 1)] == [0, 7, 2**63 - 1]
    setups = [Setups(f"seed={seed}").setups["runners"].seed for seed in (0, 0, 1)]
    assert setups[0] == setups[1] == shares[1].seed(0)
    assert setups[2] == shares[1].seed(1)


@pytest.mark.parametrize("slots", [(4, 8), (1, 2), (3, 3), (6, 10, 15), (5,)])
def test_an_automatic_batch_is_the_smallest_that_every_policy_divides(slots: tuple[int, ...]) -> None:
    """Catches batches of several times the steps that were needed, and those that a policy cannot divide."""
    for minibatches in range(1, 13):
        unrolls = unrolls_that_divide(minibatches, slots)
        found = next(n for n in itertools.count(1) if all(n * own % minibatches == 0 for own in slots))
        assert unrolls == found


@pytest.mark.parametrize(("num_envs", "minibatches", "batch"), [(12, 4, 36), (12, 8, 48), (3, 4, 36), (60, 4, 60)])
def test_a_run_takes_the_smallest_batch(num_envs: int, minibatches: int, batch: int, tmp_path: Path) -> None:
    """Catches a rule that the run does not ask for: a third of the slots are the hunters', two thirds the runners'."""
    config = configured(f"env.num_envs={num_envs}", f"learner.minibatches={minibatches}")
    runs = prepare(config, tmp_path / "run", None)
    assert runs[0].layout.batch_size == batch
    assert [run.share.batch_size for run in runs] == [batch // 3, 2 * batch // 3]
    assert all(run.share.batch_size % minibatches == 0 for run in runs)
    # What is chosen before the agents are known fits any.
    unknown = choose_layout(config, Machine(cores=2, accelerator=False)).batch_size
    assert unknown % (minibatches * num_envs) == 0


def test_a_batch_that_does_not_divide_is_refused_with_the_smallest_that_would() -> None:
    """Catches advice that is dearer than it need be, or does not help."""
    config = configured("env.num_envs=6", "learner.minibatches=6", "learner.batch_size=6")
    layout = choose_layout(config, Machine(cores=2, accelerator=False))
    with pytest.raises(ValueError, match=r"6 do not divide the 2 segments that hunters has .* learner.batch_size=18"):
        team_shares(config, layout)
    better = configured("env.num_envs=6", "learner.minibatches=6", "learner.batch_size=18")
    team_shares(better, choose_layout(better, Machine(cores=2, accelerator=False)))


class Kept(Sink):
    """A tracker that keeps what it gets; the ``fails``-th cannot be opened."""

    made: list[Kept] = []  # noqa: RUF012  (one list for every instance is meant)
    fails = 0

    def open(self, run: LoggedRun) -> None:
        if len(self.made) + 1 == self.fails:
            raise ConnectionError("no network")
        assert run.directory.is_dir()
        self.tracked, self.lines, self.closed = run, list[Mapping[str, Any]](), 0
        self.made.append(self)

    def write(self, line: Mapping[str, Any]) -> None:
        assert not self.closed
        self.lines.append(line)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setattr(sinks_module, "TRACKERS", {"wandb": ("json", Kept)})
    Kept.made, Kept.fails = [], 0
    return Kept


@pytest.mark.parametrize("name", ["", "my-name"])
def test_every_policy_is_a_run_of_its_own_at_a_tracker(kept: type[Kept], name: str, tmp_path: Path) -> None:
    """Catches two policies under one name or id, a policy without the name of its run, and lines of the other one."""
    config = configured("log.sinks=[wandb]", f"log.name='{name}'", "total_env_steps=60")
    run_to_the_end(config, tmp_path / "the-run", quiet=True)
    told = [tracker.tracked for tracker in kept.made]
    start = name or "the-run"
    assert [each.name for each in told] == [f"{start}-hunters", f"{start}-runners"]
    assert [each.id.partition("-")[2] for each in told] == [each.policy for each in told] == ["hunters", "runners"]
    assert len({each.id.partition("-")[0] for each in told}) == 1
    assert [tracker.closed for tracker in kept.made] == [1, 1]
    steps = [tracker.lines[-1]["env_steps"] for tracker in kept.made]
    assert 0 < steps[0] < steps[1]  # type: ignore[operator]  # None is a failure here, too


def test_a_tracker_that_cannot_start_leaves_none_open(kept: type[Kept], tmp_path: Path) -> None:
    """Catches the first policy's run at the tracker, which stays open where that of the second cannot be made."""
    kept.fails = 2
    with pytest.raises(CannotStart, match="no network"):
        run_to_the_end(configured("log.sinks=[wandb]"), tmp_path / "run", quiet=True)
    assert [tracker.closed for tracker in kept.made] == [1]
