"""The import law, kept by reading the imports instead of running them."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "deploy", "envs", "learner", "policy")
MAX_LINES = 600

# What a package may import of the others.
LAW = {
    "envs": set[str](),
    "policy": set[str](),
    "actors": {"envs", "policy"},
    "learner": {"policy"},
    "deploy": {"envs", "policy", "actors", "learner"},
}
# The rooms of deploy/ (folders, and modules beside them) by floor: each imports only rooms of lower floors.
FLOORS = (
    {"launch", "records", "settings"},
    {"monitoring", "placement"},
    {"cluster", "evaluation", "weights"},
    {"replay", "report", "training"},
    {"doctor"},
    {"library"},
    {"cli", "docs", "examples"},
)
# Where a library may be imported: a module, or everything below a folder.
LIBRARIES = {
    "ray": (
        "actors/ray_actor.py",
        "actors/ray_nodes.py",
        "actors/ray_pool.py",
        "actors/supervisor.py",
        "deploy/",
    ),  # only at a process boundary
    "gymnasium": ("envs/", "deploy/examples/"),  # examples are users' code
    "mettagrid": ("envs/",),
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(source: Path) -> list[tuple[int, str]]:
    """Line and full dotted name of every import in a file, also those inside functions and type-checking blocks.

    ``from shoal.envs import x`` is ``shoal.envs``; ``from shoal import envs`` is ``shoal.envs``, too.
    """
    found: list[tuple[int, str]] = []
    parents = ("shoal", *source.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"), str(source))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            names = [f"shoal.{alias.name}" for alias in node.names] if name == "shoal" else [name]
            found += [(node.lineno, name) for name in names]
    return found


def test_imports_of_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "deploy" / "deep" / "module.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import ray.util\nif 1:\n  from shoal.envs import x\n  from . import y\n  from ..top import z\n"
        "from shoal import policy, learner\n"
    )
    assert sorted(imports_of(source)) == [
        (1, "ray.util"),
        (3, "shoal.envs"),
        (4, "shoal.deploy.deep"),
        (5, "shoal.deploy.top"),
        (6, "shoal.learner"),
        (6, "shoal.policy"),
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_law_allows(package: str) -> None:
    forbidden = {*PACKAGES, "tests"} - LAW[package] - {package}
    broken = [
        f"{source.relative_to(ROOT)}:{line} imports {name}"
        for source in modules(package)
        for line, name in imports_of(source)
        if name.startswith("shoal.") and name.split(".")[1] in forbidden
    ]
    assert not broken, "\n".join(broken)


def test_modules_of_the_root_import_no_package() -> None:
    """All packages may import ``section.py``: what it imported, they would all import."""
    broken = [
        f"{source.name}:{line} imports {name}"
        for source in ROOT.glob("*.py")
        if source.name not in ("__init__.py", "__main__.py")
        for line, name in imports_of(source)
        if name.startswith("shoal")
    ]
    assert not broken, "\n".join(broken)


def room_of(source: Path) -> str:
    """The first folder below deploy/, or the module that lies beside the folders."""
    return source.relative_to(ROOT / "deploy").parts[0].removesuffix(".py")


def test_every_room_of_deploy_has_a_floor() -> None:
    """A room that is forgotten would escape the next test; one that is gone would keep its place."""
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({room_of(source) for source in modules("deploy")} - {"__init__"})


def test_rooms_of_deploy_import_only_lower_floors() -> None:
    """No circle between rooms, and no import upward; an import of the whole of ``shoal.deploy`` says no room."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    broken = []
    for source in modules("deploy"):
        here = room_of(source)
        for line, name in imports_of(source):
            if name.split(".")[:2] != ["shoal", "deploy"]:
                continue
            there = ".".join(name.split(".")[2:3])
            if there != here and floor_of.get(there, len(FLOORS)) >= floor_of.get(here, 0):
                broken.append(f"{source.relative_to(ROOT)}:{line} imports {name}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_where_they_belong(library: str) -> None:
    broken = [
        f"{source.relative_to(ROOT)}:{line} imports {name}"
        for package in PACKAGES
        for source in modules(package)
        for line, name in imports_of(source)
        if name.split(".")[0] == library and not source.relative_to(ROOT).as_posix().startswith(LIBRARIES[library])
    ]
    assert not broken, "\n".join(broken)


def test_the_package_is_this_checkout() -> None:
    """Another checkout or an old wheel that is installed would be tested instead."""
    spec = importlib.util.find_spec("shoal")
    assert spec is not None
    assert {Path(place).resolve() for place in spec.submodule_search_locations or ()} == {ROOT}


def test_every_package_is_listed() -> None:
    """Packages are named one by one in pyproject.toml; one that is forgotten would be missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {source.parent.relative_to(ROOT) for package in PACKAGES for source in modules(package)}
    assert sorted(["shoal", *(".".join(("shoal", *folder.parts)) for folder in folders)]) == sorted(listed)
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    """`shoal --help` and a configuration error answer at once: torch, Ray and MettaGrid take seconds to import."""
    if not (ROOT / "deploy" / "cli.py").exists():
        pytest.skip("there is no command line yet")
    code = (
        "import shoal.deploy.cli, json, sys; "
        "print(json.dumps(sorted({'torch', 'ray', 'tensordict', 'mettagrid', 'gymnasium'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # The last lines of -X importtime name the chain of imports that brought the library in.
    assert json.loads(done.stdout) == [], "\n".join(line for line in done.stderr.splitlines() if "deploy" in line)


def test_no_file_is_one_that_people_dread_to_open() -> None:
    sources = [source for package in (*PACKAGES, "tests") for source in modules(package)]
    lengths = {str(source.relative_to(ROOT)): len(source.read_bytes().splitlines()) for source in sources}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_slow_tests_lie_where_they_are_run() -> None:
    """Catches a slow test that no tier runs: `make test-slow` looks in tests/service/ alone."""
    found = [path.name for path in (ROOT / "tests").glob("test_*.py") if "mark." + "slow" in path.read_text("utf-8")]
    assert found == []
