"""The run directory: where its files are, whose summary lies in it, and what environments and clocks do to that."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import shoal
from rude_envs import Wanders
from service import SMALL
from shoal.deploy.cli import main
from shoal.deploy.records.run_dir import new_run_dir

WANDERING = [
    *(setting for setting in SMALL if not setting.startswith(("env.id", "env.num_envs"))),
    *("env.id=rude_envs:Wanders-v0", "env.num_envs=2", "env.vectorization=sync", "mode=inline"),
    *("evaluation.random_seconds=0", "total_env_steps=600", "checkpoint.every_updates=5", "run_dir=run"),
]


@pytest.fixture(autouse=True)
def _directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(Wanders, "is_lost", False)
    yield
    os.chdir(tmp_path)


@pytest.mark.parametrize("at", [3, 150, 190])
def test_an_environment_that_changes_the_directory_does_not_divide_the_run(tmp_path: Path, at: int) -> None:
    """Catches a relative run_dir of which a half lies where the environment went."""
    assert main(["train", *WANDERING, f"env.kwargs={{to: {tmp_path / 'elsewhere'}, at: {at}}}"]) == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []
    run = tmp_path / "here" / "run"
    version = json.loads((run / "summary.json").read_text())["policy_version"]
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == version
    assert {"config.yaml", "metrics.jsonl", "run.log"} <= {path.name for path in run.iterdir()}


def test_the_traceback_of_a_run_lies_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback that is written, or looked for, where the environment went."""
    assert main(["train", *WANDERING, f"env.kwargs={{to: {tmp_path / 'elsewhere'}, fails: true}}"]) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
    traceback = tmp_path / "here" / "run" / "traceback.txt"
    assert "lost my way" in traceback.read_text()
    assert str(traceback) in capsys.readouterr().err


def test_an_environment_that_seeds_every_random_stream_changes_nothing_else() -> None:
    """Catches actions or minibatches that are drawn from a stream of the whole process: an environment that seeds it
    in every step has them drawn alike for ever."""
    hashes = set()
    for seeds in ("true", "false"):
        settings = [each for each in WANDERING if not each.startswith(("env.id", "run_dir"))]
        settings += ["env.id=rude_envs:Seeds-v0", f"env.kwargs={{seeds: {seeds}}}", f"run_dir=seeds-{seeds}"]
        assert main(["train", *settings, "total_env_steps=300"]) == 0
        hashes.add(json.loads(Path(f"seeds-{seeds}", "summary.json").read_text())["weights_sha256"])
    assert len(hashes) == 1


class SetsTheClock(shoal.Callback):
    """Sets the clock back by a day, and later forward by more."""

    seconds = 0.0

    def on_update(self, run: Any, update: Any) -> Mapping[str, float] | None:
        self.seconds = {0: 0.0, 1: -86_400.0, 2: 1e6}[update.policy_version % 3]
        return None


def test_a_clock_that_is_set_moves_nothing_but_dates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that ends or counts seconds that it did not have because the clock was set, and a report that
    cannot be made of it."""
    clock, real = SetsTheClock(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock.seconds)
    begun = time.monotonic()
    config: dict[str, Any] = {"env.id": "recall", "mode": "inline", "env.num_envs": 4, "actor.unroll_length": 8}
    config |= {"learner.batch_size": 8, "learner.epochs": 1, "learner.minibatches": 1}
    config |= {"evaluation.random_seconds": 0, "log.every_seconds": 0.001}
    run = shoal.train(
        config=config, run_dir="run", total_env_steps=1000, max_seconds=100_000.0, callbacks=[clock], progress=False
    )
    assert run.summary["stopped_by"] is None
    assert 0 < run.summary["wall_seconds"] <= time.monotonic() - begun
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    assert len({round(line["time"], -4) for line in lines}) > 1  # it was set
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= time.monotonic() - begun
    assert lines[-1]["seconds"] == pytest.approx(run.summary["wall_seconds"], abs=1e-3)
    assert main(["report", "run"]) == 0
    assert "run" in capsys.readouterr().out


class TakesItsTime(shoal.Callback):
    """Delays training by half a second, as an environment that is measured at random first does."""

    def on_start(self, run: Any) -> None:
        time.sleep(0.5)


def test_seconds_of_training_are_counted_from_its_begin() -> None:
    """Catches a clock that is set anew when training begins, whose metrics then have seconds that fall."""
    config: dict[str, Any] = {"env.id": "recall", "mode": "inline", "env.num_envs": 4, "actor.unroll_length": 8}
    config |= {"learner.batch_size": 8, "evaluation.random_seconds": 0, "log.every_seconds": 0.01}
    shoal.train(config=config, run_dir="run", total_env_steps=200, callbacks=[TakesItsTime()], progress=False)
    lines = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    before = [line["seconds"] for line in lines if line["policy_version"] == 0]
    assert len(before) > 10
    assert before[0] == 0


class Looks(shoal.Callback):
    """Notes whether there is a summary while the run is under way."""

    def __init__(self) -> None:
        self.found: set[bool] = set()

    def on_start(self, run: Any) -> None:
        self.found.add((run.run_dir / "summary.json").exists())

    def on_update(self, run: Any, update: Any) -> Mapping[str, float] | None:
        self.found.add((run.run_dir / "summary.json").exists())
        return None


def test_a_session_under_way_has_no_summary(tmp_path: Path) -> None:
    """Catches the summary of an earlier session that is read as the end of one that was killed."""
    looks = Looks()
    config = {"env.id": "recall", "mode": "inline", "env.num_envs": 4, "actor.unroll_length": 8}
    config |= {"learner.batch_size": 8, "evaluation.random_seconds": 0}  # type: ignore[dict-item]
    for steps in (100, 200, 300):
        shoal.train(config=config, run_dir="run", total_env_steps=steps, callbacks=[looks], progress=False)
        assert json.loads((tmp_path / "here" / "run" / "summary.json").read_text())["env_steps"] >= steps
    assert looks.found == {False}


def test_what_environments_print_is_no_part_of_an_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches JSON that nobody can read, because the environment printed into it; from C or another process, too."""
    arguments = [argument for argument in WANDERING if not argument.startswith("env.id")]
    assert main(["train", *arguments, "env.id=rude_envs:Prints-v0", "total_env_steps=20"]) == 0
    capfd.readouterr()
    assert main(["evaluate", "run", "--episodes", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["episodes"] == 2
    assert err.count("{") >= 2 * 2 * 50  # by two slots, in two of the ways


@pytest.mark.parametrize("name", [".lock", "run.log", "evaluation.jsonl", "metrics.jsonl", "config.yaml"])
def test_a_pipe_in_a_run_directory_is_said_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Catches a run that hangs before it says a word, or after it has trained."""
    (run := tmp_path / "here" / "run").mkdir()
    os.mkfifo(run / name)
    assert main(["train", *WANDERING, f"env.kwargs={{to: {tmp_path / 'elsewhere'}, at: 3}}"]) == 2
    assert f"{name} is a pipe; remove it or choose another run_dir" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [name]


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("__main__:partial(MyEnv)", "MyEnv"),
        ("__main__:partial(partial(MyEnv))#2", "MyEnv-2"),
        ("__main__:make.<locals>.<lambda>", "make-lambda"),
        ("ALE/Pong-v5", "ALE-Pong-v5"),
        ("package.module:Name-v0", "package-module-Name-v0"),
        ("<>", "environment"),
    ],
)
def test_names_of_run_directories_are_plain(env_id: str, name: str) -> None:
    """Catches Python's own words, and rows of hyphens, in the name of a directory."""
    assert re.fullmatch(rf"runs/{name}-\d{{8}}-\d{{6}}(-\d)?", new_run_dir(env_id))


def test_runs_of_one_moment_have_directories_of_their_own() -> None:
    """Catches threads that start runs within a second, of which one may write."""
    names = [new_run_dir("Alike-v0") for _ in range(3)]
    assert len(set(names)) == 3
