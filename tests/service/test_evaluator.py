"""Evaluation during training: results, failures, the end of a run, and that training does not notice."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import end_itself, own_pid, raise_error, square
from service import SMALL, alive, descendants, make_setup, read_summary, start_shoal, wait_for
from shoal.deploy.cli import main
from shoal.deploy.evaluation import evaluator
from shoal.deploy.evaluation.evaluate import evaluate, evaluation_setup
from shoal.deploy.evaluation.evaluator import Evaluator, Taken, training_side
from shoal.deploy.evaluation.job_process import JobFailed, JobProcess
from shoal.deploy.monitoring.catalogue import CATALOGUE, Sources
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations, read_evaluations
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.sections import EvaluationConfig
from shoal.learner.checkpoint import find_checkpoint
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics
from shoal.learner.trajectory_queue import TrajectoryQueue
from shoal.policy.trajectory import TrajectorySpec
from shoal.policy.weights import Weights, flatten_weights

FRAGILE = "env.id=evaluated_envs:Fragile-v0"


def arguments(run: Path, *settings: str) -> list[str]:
    return ["train", "mode=inline", *SMALL, f"run_dir={run}", *settings]


def result(env_steps: int, mean: float, **changes: Any) -> EvaluationResult:
    found = EvaluationResult(
        time=1.0,
        session=0,
        policy_version=env_steps // 10,
        env_steps=env_steps,
        episodes=8,
        mean_return=mean,
        return_ci95=0.5,
        mean_length=4.0,
    )
    return found._replace(**changes)


class Bench:
    """An evaluator with everything it watches."""

    def __init__(self, directory: Path, env: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self.setup = make_setup("evaluated_envs:Fragile-v0", num_envs=4, **(env or {}))
        self.weights = flatten_weights(self.setup.make_policy(), 3)
        self.env_steps, self.hurried = 0, False
        self.kept: list[tuple[int, Mapping[str, Any]]] = []
        self.evaluations = Evaluations(directory / "evaluation.jsonl")
        self.jobs: JobProcess[Any] = JobProcess(silent=True)
        self.evaluator = Evaluator(
            config := EvaluationConfig(**{"every_env_steps": 100, "episodes": 8, "niceness": 0, **settings}),
            training_side(self.setup, config, num_agents=1, seed=0),
            self.jobs,
            {"": self.evaluations},
            session=2,
            newest=lambda: {"": Taken(self.weights, self.env_steps)},
            env_steps=0,
            describe=lambda: {"env_steps": self.env_steps},
            keep_best=self.keep,
            hurried=lambda: self.hurried,
        )

    def keep(self, weights: Weights, state: Mapping[str, Any]) -> None:
        self.kept.append((weights.policy_version, state))
        raise OSError("disk full")

    def done(self, made: int, failed: int = 0) -> Callable[[], bool]:
        return lambda: (self.evaluations.count, self.evaluations.failed) == (made, failed)


def test_it_evaluates_when_steps_are_due(tmp_path: Path) -> None:
    """Catches an evaluation before its time, one for every interval that passed meanwhile, weights or steps that are
    not those when it began, a new process for every evaluation, and a full disk that ends it.
    """
    bench = Bench(tmp_path)
    with bench.evaluator:
        bench.env_steps = 99
        time.sleep(1.5)
        assert bench.done(0)()
        assert bench.jobs.pid is None
        bench.env_steps = 450
        wait_for(bench.done(1))
        process = bench.jobs.pid
        assert process is not None
        bench.env_steps, bench.weights = 499, Weights(9, bench.weights.flat, bench.weights.content_hash)
        time.sleep(1.5)
        assert bench.done(1)()
        bench.env_steps = 500
        wait_for(bench.done(2))
        assert bench.jobs.pid == process
    first, second = read_evaluations(tmp_path / "evaluation.jsonl")
    assert (first.session, first.policy_version, first.env_steps, first.episodes) == (2, 3, 450, 8)
    assert (second.policy_version, second.env_steps) == (9, 500)
    # The same weights and seeds.
    assert first._replace(time=0, policy_version=0, env_steps=0) == second._replace(
        time=0, policy_version=0, env_steps=0
    )
    assert first.mean_length == 4
    assert bench.kept == [
        (3, {"env_steps": 450, "evaluation": first.to_json()}),
        (9, {"env_steps": 500, "evaluation": second.to_json()}),
    ]
    assert bench.evaluations.best is None  # neither could be kept
    wait_for(lambda: not alive(process), seconds=200)


def test_a_run_waits_for_its_last_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an evaluation that falls due with the last update, or is under way then, and vanishes without a word."""
    bench = Bench(tmp_path)
    with bench.evaluator:
        bench.env_steps = 100
    assert bench.done(1)()
    assert read_evaluations(tmp_path / "evaluation.jsonl")[0].env_steps == 100
    assert "training is over; the evaluation of policy version 3 is waited for, for 30 s at most" in caplog.text
    assert "is left out" not in caplog.text


@pytest.mark.parametrize("why", ["too long", "interrupted", "failed"])
def test_an_evaluation_that_is_not_waited_for_is_told(
    why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that waits for an environment which hangs, after Ctrl-C, or after a failure, and no word of it."""
    monkeypatch.setattr(evaluator, "LAST_SECONDS", 2.0 if why == "too long" else 600.0)
    bench = Bench(tmp_path, {"how": "hangs"}, max_seconds=200.0)
    begun = time.monotonic()
    with contextlib.suppress(KeyError), bench.evaluator:
        bench.env_steps = 100
        wait_for(lambda: bench.evaluator._under_way == "3")
        bench.hurried = why == "interrupted"
        if why == "failed":
            raise KeyError
    assert time.monotonic() - begun < 100
    assert bench.done(0)()
    assert "the evaluation of policy version 3 had not ended when the run did, and is left out" in caplog.text


@pytest.mark.parametrize("how", ["raises", "killed", "hangs"])
def test_a_failing_evaluation_is_counted_and_the_next_one_made(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an environment that fails only there and ends the thread with it, or keeps it for ever."""
    bench = Bench(tmp_path, {"how": how}, max_seconds=3.0 if how == "hangs" else 200.0)
    processes: set[int] = set()
    before = set(descendants(os.getpid()))  # of other tests

    def failed(times: int) -> bool:
        processes.update(set(descendants(os.getpid())) - before)
        return bench.done(0, failed=times)()

    with bench.evaluator:
        bench.env_steps = 100
        wait_for(lambda: failed(1))
        bench.env_steps = 200
        wait_for(lambda: failed(2))
    reasons = {
        "raises": "only when evaluated",
        "killed": "was killed by signal SIGKILL",
        "hangs": "it took longer than evaluation.max_seconds=3",
    }
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all(reasons[how] in record.getMessage() for record in caplog.records)
    assert "evaluation of policy version 3 failed" in caplog.text
    left = {title for pid, title in descendants(os.getpid()).items() if pid in processes and alive(pid)}
    # That is multiprocessing's own, one for all.
    assert processes
    assert all("resource_tracker" in title for title in left), left
    assert not (tmp_path / "evaluation.jsonl").exists()


def test_leaving_the_block_in_a_hurry_ends_an_evaluation_at_once(tmp_path: Path) -> None:
    """Catches an interrupted run whose end waits for an evaluation, or leaves its process behind."""
    marks = tmp_path / "marks"
    marks.mkdir()
    bench = Bench(tmp_path, {"how": "hangs", "marker": str(marks)}, max_seconds=3600.0)
    with bench.evaluator:
        bench.env_steps = 100
        wait_for(lambda: list(marks.iterdir()))
        bench.hurried = True
    assert not alive(int(next(marks.iterdir()).name))
    assert bench.done(0)()
    # Also before the process has begun.
    bench = Bench(tmp_path)
    with bench.evaluator:
        bench.env_steps = 100
        wait_for(lambda: bench.jobs.pid)
        process = bench.jobs.pid
        bench.hurried = True
    assert process is not None
    assert not alive(process)
    assert bench.done(0)()
    with pytest.raises(JobFailed, match="was ended"):
        bench.jobs.submit(functools.partial(int, 3))


def test_results_are_read_back_and_torn_lines_passed_over(tmp_path: Path) -> None:
    """Catches a resumed run that forgets its best, a line glued to a torn one, NaN in the file."""
    file = tmp_path / "evaluation.jsonl"
    first = Evaluations(file)
    for one in (result(100, 5.0), result(200, 4.0), result(300, 5.0, return_ci95=None)):
        first.add(one)
    with file.open("a") as torn:
        torn.write('{"time": 4.0, "sess')
    again = Evaluations(file)
    assert (again.count, again.failed) == (0, 0)
    assert again.last == again.best == result(300, 5.0, return_ci95=None)
    again.add(result(400, 1.0))
    assert again.best.env_steps == 300
    lines = file.read_text().splitlines()
    assert len(lines) == 5
    assert [json.loads(line)["env_steps"] for line in (*lines[:3], lines[4])] == [100, 200, 300, 400]
    assert set(json.loads(lines[0])) == {
        *("time", "session", "policy_version", "env_steps", "episodes", "mean_return", "return_ci95", "mean_length")
    }
    assert read_evaluations(tmp_path / "none") == []
    file.write_text('{"mean_return": NaN}\n[1]\nnull\n{}\n')
    assert read_evaluations(file) == []


def test_metrics_read_the_last_and_the_best() -> None:
    """Catches gauges of one evaluation under the other's name, and a page that fails before the first."""
    evaluations = Evaluations()
    setup = make_setup("recall")
    spec = TrajectorySpec(8, (5,), "float32", (), "int64", num_actions=(4,))
    trajectory_queue = TrajectoryQueue(
        spec, run_id=setup.run_id, num_actors=1, num_envs=4, batch_size=4, max_policy_lag=0, ledger=Ledger()
    )
    sources = Sources(
        statistics=RunStatistics(trajectory_queue.ledger),
        trajectory_queue=trajectory_queue,
        actors_alive=lambda: 1,
        actor_restarts=dict,
        bottleneck=lambda: None,
        build={},
        evaluations=evaluations,
    )

    def read() -> dict[str, float]:
        return {
            entry.name.removeprefix("shoal_"): entry.read(sources) for entry in CATALOGUE if "evaluation" in entry.name
        }

    names = ["evaluation_return", "evaluation_best_return", "evaluation_env_steps", "evaluations_total"]
    names += ["failed_evaluations_total"]
    assert list(read()) == names
    assert np.isnan([read()[name] for name in names[:3]]).all()
    evaluations.add(result(100, 5.0))
    evaluations.add(result(200, 4.0))
    evaluations.failed += 1
    assert list(read().values()) == [4.0, 5.0, 200, 2, 1]


def test_bad_settings_are_refused() -> None:
    """Catches a negative interval that would be due at every look."""
    _, problems = load_config(
        [],
        [
            *("evaluation.every_env_steps=-1", "evaluation.episodes=0", "evaluation.max_seconds=0"),
            *("evaluation.niceness=20", "evaluation.every=3"),
        ],
    )
    assert len(problems) == 5, problems
    assert all(problem.startswith("evaluation.") for problem in problems)


def test_training_does_not_notice_and_the_best_can_be_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches evaluation that draws from training's random streams, a result that is not that of the weights it names,
    a best that cannot be played or trained on, and a summary or screen without it.
    """
    env = ("env.kwargs={min_delay: 1, max_delay: 3}", "seed=4", "learner.schedules.learning_rate={kind: constant}")
    run, plain = tmp_path / "run", tmp_path / "plain"
    evaluated = (
        "evaluation.every_env_steps=200",
        "evaluation.episodes=32",
        "evaluation.niceness=0",
        "total_env_steps=1000000000",
    )
    process = start_shoal(*arguments(run, *env, *evaluated), cwd=tmp_path)
    wait_for(lambda: list(run.glob("best/0*")), process=process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=400)
    summary = read_summary(run)
    assert main(arguments(plain, *env, f"total_env_steps={summary['env_steps']}")) == 0
    assert summary["weights_sha256"] == read_summary(plain)["weights_sha256"]
    assert read_summary(plain)["evaluation"] is None
    results = read_evaluations(run / "evaluation.jsonl")
    assert results
    assert [r.env_steps for r in results] == sorted(r.env_steps for r in results)
    assert all(r.env_steps >= 200 and r.episodes == 32 for r in results)
    best = max(results, key=lambda r: (r.mean_return, r.env_steps))
    assert summary["evaluation"] == {
        "made": len(results),
        "failed": 0,
        "last": results[-1].to_json(),
        "best": best.to_json(),
    }
    assert "evaluation: return " in said
    assert "  evaluation  return " in said
    # The checkpoint is what was evaluated: the same seeds give the same return.
    checkpoint = find_checkpoint(run / "best")
    assert checkpoint.policy_version == best.policy_version
    setup = evaluation_setup(checkpoint, num_envs=8, seed=0)
    config = EvaluationConfig(every_env_steps=1, episodes=32)
    seed = training_side(setup, config, num_agents=1, seed=4).setup.seed
    setup = evaluation_setup(checkpoint, num_envs=8, seed=seed)
    assert evaluate(checkpoint, setup, episodes=32).mean == best.mean_return
    books = checkpoint.state["ledger"]
    assert books["sampled"] == books["trained"] + books["in_flight"] + sum(books["dropped"].values())
    assert main(["evaluate", str(run / "best"), "--episodes", "8"]) == 0
    more = f"total_env_steps={books['trained'] + 500}"
    goes_on = arguments(tmp_path / "on", f"resume={run / 'best'}", *env, more)
    assert main(goes_on) == 0
    assert read_summary(tmp_path / "on")["policy_version"] > best.policy_version


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_a_run_ends_its_evaluation(number: signal.Signals, tmp_path: Path) -> None:
    """Catches Ctrl-C that reaches the evaluation as well, or that waits for it, and a process that stays."""
    marks = tmp_path / "marks"
    marks.mkdir()
    env = f"env.kwargs={{how: hangs, marker: {marks}}}"
    evaluation = ("evaluation.every_env_steps=100", "evaluation.max_seconds=3600", "evaluation.niceness=3")
    process = start_shoal(
        *arguments(tmp_path / "run", FRAGILE, env, *evaluation, "total_env_steps=1000000000", "max_seconds=800"),
        cwd=tmp_path,
    )
    wait_for(lambda: list(marks.iterdir()), process=process)
    evaluating = int(next(marks.iterdir()).name)
    below = set(descendants(process.pid))
    assert evaluating in below
    niceness = int(Path(f"/proc/{evaluating}/stat").read_text().rpartition(")")[2].split()[16])
    assert niceness == 3
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 128 + number, said
    assert "Interrupted; saved." in said
    assert "Traceback" not in said
    warned = [line for line in said.splitlines() if "WARNING" in line]
    assert len(warned) == 1
    assert "had not ended when the run did, and is left out" in warned[0]
    assert not alive(evaluating)
    wait_for(lambda: not any(map(alive, below)), seconds=200)
    assert read_summary(tmp_path / "run")["evaluation"] is None


def test_a_run_that_is_killed_takes_its_evaluation_along(tmp_path: Path) -> None:
    """Catches an evaluation that goes on for ever after the second Ctrl-C, or after the run was killed."""
    marks = tmp_path / "marks"
    marks.mkdir()
    env = f"env.kwargs={{how: hangs, marker: {marks}}}"
    process = start_shoal(
        *arguments(tmp_path / "run", FRAGILE, env, "evaluation.every_env_steps=100", "evaluation.niceness=0"),
        cwd=tmp_path,
    )
    wait_for(lambda: list(marks.iterdir()), process=process)
    below = set(descendants(process.pid))
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, below)), seconds=200)


def test_jobs_in_the_cluster_fail_and_end_as_those_here(ray_session: None) -> None:
    """Catches an actor that takes the place of a rollout actor, an error that is Ray's instead of the environment's,
    and an actor that is not replaced.
    """
    from shoal.deploy.cluster.ray_session import watched
    from shoal.deploy.evaluation.ray_jobs import RayJobs

    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(watched(""))
        jobs = RayJobs({"num_cpus": 64, "resources": {"none": 1}, "scheduling_strategy": "SPREAD"}, watch)
        stack.callback(jobs.kill)
        jobs.submit(functools.partial(square, 5))
        wait_for(lambda: jobs.poll(0.2))
        assert jobs.result() == 25
        jobs.submit(own_pid)
        first = jobs.result()
        jobs.submit(functools.partial(raise_error, "not there"))
        with pytest.raises(JobFailed, match="LookupError: not there"):
            jobs.result()
        jobs.submit(functools.partial(end_itself, 3))
        with pytest.raises(JobFailed, match=r"ActorDiedError|RayActorError"):
            jobs.result()
        jobs.submit(own_pid)
        second = jobs.result()
        assert second != first
        jobs.submit(functools.partial(time.sleep, 3600))
        assert not jobs.poll(0.1)
    wait_for(lambda: not alive(second))
    with pytest.raises(JobFailed, match="was ended"):
        jobs.submit(own_pid)
