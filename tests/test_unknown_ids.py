"""What is said of an environment id whose module is there and has no such environment."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.registry import make_env_spec

_ENVS = """
import gymnasium
raise_if_imported = 1 / 0
gymnasium.register("Track-v0", entry_point="outer_pkg.envs:Road")
class Road(gymnasium.Env):
    def reset(self): ...
    def step(self): ...
def Lane(): ...
"""
_ROADS = """
import gymnasium
from gymnasium.wrappers import TimeLimit
LIMIT = 7
class Motorway(gymnasium.Env): ...
gymnasium.register("Alley-v0", entry_point="outer_pkg.roads:Motorway")
"""


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "outer_pkg"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "roads.py").write_text(_ROADS)
    (package / "envs.py").write_text(_ENVS)
    (package / "inner" / "__init__.py").write_text("class Deep: ...")
    (package / "tests").mkdir()
    (package / "tests" / "test_it.py").write_text("'Nowhere-v0'")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(gymnasium.registry)
    yield
    for each in gymnasium.registry.keys() - known:
        del gymnasium.registry[each]
    for each in [name for name in sys.modules if name.startswith("outer_pkg")]:
        del sys.modules[each]


@pytest.mark.parametrize(
    ("env_id", "said"),
    [
        ("outer_pkg:Track-v0", "it is in a module inside outer_pkg: write outer_pkg.envs:Track-v0"),
        ("outer_pkg:Road", "write outer_pkg.envs:Road"),
        ("outer_pkg:Lane", "write outer_pkg.envs:Lane"),
        ("outer_pkg:Deep", "write outer_pkg.inner:Deep"),
        ("outer_pkg:Nowhere-v0", "of that name; write package.module:Name with the module that registers"),
        ("outer_pkg.roads:Alley-v1", "did you mean outer_pkg.roads:Alley-v0?"),
        ("outer_pkg.roads:Motorwey", "did you mean outer_pkg.roads:Motorway?"),
        ("outer_pkg.roads:LIMITS", "of that name; there are outer_pkg.roads:Alley-v0, outer_pkg.roads:Motorway"),
        ("outer_pkg.roads:CartPole-v8", "did you mean CartPole-v1 or CartPole-v0?"),
        ("gymnasium:CartPole-v8", "did you mean CartPole-v1 or"),
    ],
)
def test_an_id_is_answered_by_where_it_is_or_what_there_is(env_id: str, said: str, outer: None) -> None:
    """Catches an id of a module inside the package that is called unknown; submodules that are imported to look for it,
    of which one raises here; and constants, and other libraries' classes, offered as environments."""
    module, _, name = env_id.partition(":")
    looked = f"importing {module} registers no {name}, and {module} has no class or function of that name"
    with pytest.raises(EnvironmentNotFound, match=re.escape(looked)) as raised:
        make_env_spec(env_id)
    assert re.search(re.escape(said), str(raised.value))
    assert "TimeLimit" not in str(raised.value)
