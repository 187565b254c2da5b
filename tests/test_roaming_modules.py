"""Relative paths, where a module of the user's changes the working directory when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import shoal
from service import SMALL
from shoal.deploy.cli import main
from shoal.deploy.settings.load import load_config
from shoal.deploy.settings.paths import with_absolute_paths
from shoal.learner.checkpoint import find_checkpoint

MODULE = """
import os
os.chdir({elsewhere!r})
import shoal
from own_cores import Leaky
from shoal.learner.loss import ppo_loss as loss

class Roams(Leaky):
    pass

class Watches(shoal.Callback):
    pass

class Writes(shoal.Sink):
    def write(self, line):
        pass
"""
SETTINGS = [*SMALL, "mode=inline", "evaluation.random_seconds=0", "metrics.port=0", "metrics.file_sd=targets.json"]
BY = [
    "policy.core=roaming:Roams",
    "callbacks=[roaming:Watches]",
    "learner.loss=roaming:loss",
    "log.sinks=[roaming:Writes]",
]

Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """A command in ``here``, whose modules are imported anew and change to ``elsewhere``."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for place in (here, elsewhere, tmp_path / "modules"):
        place.mkdir()
    (tmp_path / "modules" / "roaming.py").write_text(MODULE.format(elsewhere=str(elsewhere)))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def run(*arguments: str) -> int:
        forget()
        return main(arguments)

    def forget() -> None:
        os.chdir(here)
        sys.modules.pop("roaming", None)

    before = os.getcwd()
    forget()
    yield run
    forget()
    os.chdir(before)


@pytest.mark.parametrize("by", BY)
def test_a_module_that_changes_the_directory_does_not_move_the_run(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    """Catches a run that is looked for in one directory and written to another: it never resumes, and trains from zero
    in silence; and an announcement to Prometheus that stays for ever."""
    for session, steps in enumerate((200, 400)):
        assert command("train", *SETTINGS, by, "run_dir=run", f"total_env_steps={steps}") == 0
        assert Path.cwd() == tmp_path / "elsewhere"
        assert "  play it     shoal evaluate run\n" in capsys.readouterr().out
        checkpoint = find_checkpoint(tmp_path / "here" / "run")
        assert checkpoint.state["session"] == session
        assert checkpoint.state["config"]["run_dir"] == "run"
    assert command("train", *SETTINGS, by, "run_dir=fork", "resume=run", "total_env_steps=600") == 0
    assert find_checkpoint(tmp_path / "here" / "fork").state["ledger"]["trained"] >= 600
    assert command("train", *SETTINGS, by, "run_dir=run", "resume=never") == 2
    assert command("doctor", *SETTINGS, by, "run_dir=run", "resume=never") == 2
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["fork", "run"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_module_that_changes_the_directory_does_not_move_what_is_evaluated_or_written(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches weights, an opponent or a place to write to that is looked for where the policy's module went."""
    here, by = tmp_path / "here", BY[0]
    assert command("train", *SETTINGS, by, "run_dir=run", "total_env_steps=200") == 0
    arguments = ["evaluate", "run", "--episodes", "8", "--processes", "1"]
    assert command(*arguments, "--vs", "run", "--memory-horizon", "0", "1") == 0
    assert "recorded in run/memory_horizon.json" in capsys.readouterr().out
    assert (here / "run" / "memory_horizon.json").is_file()
    assert command("export", "run", "--out", "unroll.arrow") == 0
    assert (here / "unroll.arrow").is_file()
    assert command("replay", "run", "--update", "1") == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []

    os.chdir(here)
    run = shoal.Run("run")
    sys.modules.pop("roaming")
    assert run.policy is not None
    assert Path.cwd() == tmp_path / "elsewhere"
    assert run.evaluate(8, processes=1).mean is not None
    assert run.summary["env_steps"] >= 200


def test_all_paths_of_the_settings_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file of the endpoint's that is read again where an environment went, or code that is sent from there;
    and an address or a word that is taken for a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/")
    files = {name: f"link/../{name}" for name in ("tls_certificate", "tls_key", "token_file", "file_sd")}
    config, problems = load_config(
        [],
        [
            *(f"metrics.{name}={path}" for name, path in files.items()),
            "resume=runs/a",
            "cluster.runtime_env={working_dir: code, py_modules: [one, s3://bucket/two.zip], pip: [three]}",
        ],
    )
    assert problems == []
    found = with_absolute_paths(config)
    for name, path in files.items():
        assert getattr(found.metrics, name) == f"{tmp_path}/{path}"
    assert found.resume == f"{tmp_path}/runs/a"
    assert found.cluster.runtime_env == {
        "working_dir": f"{tmp_path}/code",
        "py_modules": [f"{tmp_path}/one", "s3://bucket/two.zip"],
        "pip": ["three"],
    }
    for word in ("auto", "never"):
        assert with_absolute_paths(load_config([], [f"resume={word}"])[0]).resume == word
    assert with_absolute_paths(found) == found
