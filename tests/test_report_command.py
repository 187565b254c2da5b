"""The command `shoal report`: what it refuses, where the page goes, and what it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from recorded_runs import config, lines, summary, write_run
from shoal.deploy.cli import main
from shoal.deploy.report import command


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """Return the message of a refused command."""
    capsys.readouterr()
    assert main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a first problem that hides the others, a page of half the runs."""
    good = write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    old = write_run(tmp_path / "old", ended=summary(lines()[-1]))
    (old / "metrics.jsonl").unlink()
    nothing, broken = write_run(tmp_path / "nothing", []), write_run(tmp_path / "broken", [], tail=b"x\ny\n")
    other = write_run(tmp_path / "other", settings=config(env__id="recall"))
    paths = [good, tmp_path / "missing", tmp_path / "empty", old, nothing, broken, good, good / "config.yaml"]
    said = refused(capsys, *paths, "--out", tmp_path / "page.html")
    assert said[0] == "shoal: 7 problems, nothing was started:"
    for problem, words in zip(
        said[1:],
        (
            "there is no such directory",
            "is no run directory",
            "has no metrics.jsonl",
            "it is empty",
            "none of its 2 lines can be read",
            "is named twice",
            "is no run directory",
        ),
        strict=True,
    ):
        assert words in problem
    (told,) = refused(capsys, good, other, "--out", tmp_path / "page.html")[1:]
    assert f"{good} is of mettagrid/forage; {other} is of recall" in told
    assert not (tmp_path / "page.html").exists()


def test_where_the_page_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a page in an unexpected place, and a file of the user's that it is written over."""
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / str(seed), lines(3), settings=config(seed=seed)) for seed in (0, 1)]
    for _ in range(2):  # a report may be made anew
        assert main(["report", str(runs[0])]) == 0
        assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert main(["report", "0", "1"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert main(["report", "0/metrics.jsonl", "--out", "new/folder/page.html"]) == 0
    assert (tmp_path / "new" / "folder" / "page.html").stat().st_size > 1000
    before = (runs[0] / "config.yaml").read_text()
    assert "is no report" in refused(capsys, "0", "--out", "0/config.yaml")[1]
    assert (runs[0] / "config.yaml").read_text() == before
    assert "is a directory" in refused(capsys, "0", "--out", "0")[1]
    assert "cannot be written" in refused(capsys, "0", "--out", "0/config.yaml/page.html")[1]


def test_a_missing_library_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an ImportError where the extra is not installed."""
    monkeypatch.setattr(command, "NEEDED", ("plotly", "no_such_library"))
    (told,) = refused(capsys, tmp_path)[1:]
    assert "no_such_library must be installed: pip install 'shoal[report]'" in told


def test_a_report_needs_neither_torch_nor_ray() -> None:
    """Catches an import that makes a report of a second take ten, or need what another machine does not have."""
    code = (
        "import shoal.deploy.report.one_run, shoal.deploy.report.several_runs, shoal.deploy.report.command, json, sys; "
        "print(json.dumps(sorted({'torch', 'ray', 'tensordict', 'pyarrow', 'gymnasium'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(done.stdout) == []


def test_everything_a_page_is_made_of_is_installed() -> None:
    """Catches a template that lies in a checkout and not in the wheel."""
    root = Path(command.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["shoal.deploy.report"]
    packed = {path for pattern in patterns for path in (root / "deploy" / "report").glob(pattern)}
    parts = {path for path in (root / "deploy" / "report").iterdir() if path.is_file() and path.suffix != ".py"}
    assert len(parts) >= 3
    assert parts <= packed
    extra = project["project"]["optional-dependencies"]["report"]
    assert {re.split(r"\W", requirement)[0] for requirement in extra} == set(command.NEEDED)
