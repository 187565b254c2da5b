"""Modules of the user's that are scripts: importing them ends the program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from shoal.deploy.doctor import preflight
from shoal.deploy.settings.load import load_config

SCRIPT = """
import argparse

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.parse_args()
"""


@pytest.mark.parametrize(
    "setting",
    [
        "env.id=a_script:Env",
        "env.id=a_script:Env-v0",
        "env.id=pettingzoo:a_script:make",
        "env.id=mettagrid:a_script:make",
        "env.wrappers=[a_script:Wrapper]",
        "policy.kind=a_script:Policy",
        "policy.core=a_script:Core",
        "learner.loss=a_script:loss",
        "learner.optimizer=a_script:Optimizer",
        "learner.schedules.clip_coef.kind=a_script:schedule",
        "callbacks=[a_script:Callback]",
        "log.sinks=[a_script:Sink]",
    ],
)
def test_a_script_is_named(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that ends with the exit code and the usage of the user's script, and no word of its own."""
    (tmp_path / "a_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["shoal"])
    config, problems = load_config((), ["env.id=CartPole-v1", "mode=inline", "metrics.port=-1", setting])
    problems = problems or preflight.check(config, tmp_path / "run")
    found = [problem for problem in problems if "exit 2" in problem]
    assert found, problems
    assert setting.partition("=")[0].split(".")[-1].removesuffix("kind") in found[0]
    assert "a_script" in found[0]
