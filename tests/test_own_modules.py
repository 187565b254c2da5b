"""Which modules of the user's are sent to the nodes of a cluster."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal.deploy.cluster.own_modules import names_of, own_modules
from shoal.deploy.library.config import make_config

ENV = """
import gymnasium
import numpy
import sent_parts.board
import sent_tools
class Env(gymnasium.Env):
    def step(self, action): ...
    def reset(self, *, seed=None, options=None): ...
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with modules, some of which nobody imports."""
    (tmp_path / "sent_env.py").write_text(ENV)
    (tmp_path / "sent_tools.py").write_text("import json\n")
    (tmp_path / "not_sent.py").write_text("")
    (tmp_path / "sent_parts").mkdir()
    for name in ("__init__", "board"):
        (tmp_path / "sent_parts" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("sent_", "not_sent"))]:
        del sys.modules[name]


def test_what_is_imported_from_beside_the_environment_is_sent(project: Path) -> None:
    """Catches a node without the helper module that the environment imports, and a project that is sent whole."""
    config = make_config({"env.id": "sent_env:Env"})
    __import__("sent_env")
    assert own_modules(config) == [project / name for name in ("sent_env.py", "sent_parts", "sent_tools.py")]
    assert names_of(["/x/sent_env.py", Path("/x/sent_parts"), "s3://x/sent_tools-1.0-py3-none-any.whl"]) == {
        "sent_env",
        "sent_parts",
        "sent_tools",
    }


@pytest.mark.parametrize(
    "setting",
    [
        "policy.kind",
        "policy.core",
        "learner.loss",
        "learner.optimizer",
        "learner.schedules.clip_coef.kind",
        "env.id",
        "env.wrappers",
    ],
)
def test_what_any_setting_names_is_sent(setting: str, project: Path) -> None:
    """Catches a node without the module of a core, which every actor makes."""
    name = "not_sent:Mine"
    assert own_modules(make_config({setting: [name] if setting == "env.wrappers" else name})) == [
        project / "not_sent.py"
    ]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "recall", "gymnasium.envs.classic_control:CartPoleEnv"])
def test_what_is_installed_is_not_sent(env_id: str, project: Path) -> None:
    """Catches gymnasium itself on its way to every node, or whatever else lies in the current directory."""
    __import__("sent_env")
    assert own_modules(make_config({"env.id": env_id})) == []
    # Its own code goes to the nodes in another way, whatever settings name parts of it.
    assert own_modules(make_config({"env.id": "shoal.deploy.examples.own_environment:Lamps"})) == []
    assert Path(sysconfig.get_path("purelib")) in Path(sys.modules["gymnasium"].__file__ or "").parents
