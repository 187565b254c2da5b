"""How many problems a command tells of."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from shoal.deploy import cli
from shoal.deploy.records.run_dir import CannotStart
from shoal.problems import Problems, problems_of


def test_a_message_of_several_lines_is_one_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a headline that counts the lines of other people's messages, and lines that look like problems."""
    from shoal.deploy.training import run

    def refuse(*_: object, **__: object) -> None:
        raise CannotStart("log.sinks: wandb: no key\n\nrun `wandb login`", "seed: wrong")

    monkeypatch.setattr(run, "run", refuse)
    assert cli.main(["train", "env.id=recall", "metrics.port=-1"]) == 2
    said = capsys.readouterr().err
    expected = (
        "shoal: 2 problems, nothing was started:\n  log.sinks: wandb: no key\n    run `wandb login`\n  seed: wrong\n"
    )
    assert said.endswith(expected)


def test_an_environment_whose_message_has_several_lines_is_one_problem_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches the same where the error is not ours and knows of no problems."""

    def refuse(_: object) -> str:
        raise ValueError("no ROM\nput it in roms/")

    monkeypatch.setattr(cli, "_export_unroll", refuse)
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "a.arrow")]) == 2
    assert capsys.readouterr().err == "shoal: 1 problem, nothing was started:\n  no ROM\n    put it in roms/\n"


def test_problems_stay_apart_in_other_processes() -> None:
    """Catches an error that is one problem, or cannot be read, where it arrives."""
    error = pickle.loads(pickle.dumps(CannotStart("a\nb", "c")))
    assert problems_of(error) == ["a\nb", "c"]
    assert str(error) == "a\nb\nc"
    assert isinstance(error, Problems)
    assert problems_of(KeyError("x")) == ["'x'"]
