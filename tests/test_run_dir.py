"""The run directory: where its files are, and whose summary lies in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import shoal
from rude_envs import Wanders
from service import SMALL
from shoal.deploy.cli import main

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
