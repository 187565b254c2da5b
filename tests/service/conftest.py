"""shoal as a wheel, built once for all tests that install it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from installations import Installation, build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a used checkout, with what training, tests and builds leave in its folder."""
    folder = tmp_path_factory.mktemp("checkout") / "clone"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name in (".venv/src/left", "runs/left", "dist/left"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / ".venv" / "src" / "shoal").symlink_to("../..")
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel, started by the console script."""
    made = Installation(tmp_path_factory.mktemp("installed") / "wheel", "shoal")
    made.install(wheel)
    made.see_libraries()
    return made
