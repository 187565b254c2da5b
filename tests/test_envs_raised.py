"""What other people's code raised is said with the place that raised it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from shoal.deploy.cli import main
from shoal.envs.raised import raised


def module(path: Path, code: str) -> Any:
    """The module ``path`` with this code."""
    path.parent.mkdir(parents=True)
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_an_error_without_a_message_says_its_line(tmp_path: Path) -> None:
    """Catches 'AssertionError: AssertionError()': no library, no file, no line; and the path to the user's home."""
    code = "def set_joint(kind):\n    assert kind in (1, 2)\n"
    utils = module(tmp_path / "lib" / "site-packages" / "robots" / "utils.py", code)
    with pytest.raises(AssertionError) as caught:
        utils.set_joint(3)
    # pytest rewrites no assertions of modules that it does not collect.
    assert raised(caught.value) == "AssertionError: assert kind in (1, 2) (robots/utils.py:2)"
    assert raised(OSError("no map")) == "OSError: no map"
    assert raised(KeyError()) == "KeyError"


def test_a_broken_environment_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a refusal that names neither the file nor the line of somebody else's bug."""
    code = "import gymnasium\nclass Env(gymnasium.Env):\n    def __init__(self):\n        assert self.ready()\n"
    code += "    def ready(self):\n        return 0\n    def step(self, action): ...\n"
    (tmp_path / "broken_robots.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    gymnasium.register("BrokenRobot-v0", "broken_robots:Env")
    try:
        assert main(["train", "env.id=BrokenRobot-v0", "metrics.port=-1", f"run_dir={tmp_path / 'run'}"]) == 2
    finally:
        del gymnasium.registry["BrokenRobot-v0"]
    said = capsys.readouterr().err
    assert "env.id: BrokenRobot-v0: AssertionError: assert self.ready() (" in said
    assert "broken_robots.py:4)" in said
