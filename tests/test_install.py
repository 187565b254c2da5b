"""Installing: which torch is chosen on which machine, and what the Makefile does not do twice."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shoal.deploy.launch.install import torch_choice
from shoal.deploy.launch.install.torch_choice import PYTORCH_CPU_PAGE, Choice, Facts, choose, satisfies

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGE = "torch>=2.10"
LINUX = functools.partial(Facts, torch_range=RANGE)
PYPI = ["2.15.0", "2.14.1", "2.13.0", "2.10.0"]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def offers(configured: list[str] | None = None, pytorch: list[str] | None = None) -> torch_choice.Offers:
    """The offers of the two sources of CPU builds; one that is not given must not be asked."""

    def offered(page: str | None) -> list[str]:
        answer = configured if page is None else pytorch
        assert answer is not None, f"{page or 'pip'} was asked although the answer is known"
        return answer

    return offered


def test_torch_variable_wins_over_everything() -> None:
    facts = LINUX(override="torch==2.14.1 --find-links 'a b'", installed="2.13.0", nvidia_gpu=True)
    assert choose(facts, offers()).pip_arguments == ("torch==2.14.1", "--find-links", "a b")
    assert choose(LINUX(override="2.13.0+cpu"), offers()).pip_arguments == ("torch==2.13.0+cpu",)


@pytest.mark.parametrize("nvidia_gpu", [False, True])
def test_an_installed_torch_that_fits_is_kept(nvidia_gpu: bool) -> None:
    choice = choose(LINUX(installed="2.13.0+cpu", nvidia_gpu=nvidia_gpu), offers())
    assert choice.pip_arguments == ()
    assert bool(choice.warning) == nvidia_gpu


def test_an_installed_torch_that_is_too_old_is_replaced() -> None:
    choice = choose(LINUX(installed="2.9.1", nvidia_gpu=True), offers())
    assert choice.pip_arguments == (RANGE,)


@pytest.mark.parametrize("facts", [LINUX(system="Darwin"), LINUX(system="Windows"), LINUX(nvidia_gpu=True)])
def test_the_default_build_where_it_is_the_right_one(facts: Facts) -> None:
    assert choose(facts, offers()) == Choice(pip_arguments=(RANGE,), reason=choose(facts, offers()).reason)


def test_newest_cpu_build_of_the_configured_sources() -> None:
    choice = choose(LINUX(), offers([*PYPI, "2.9.0+cpu", "2.13.0+cpu", "2.12.1+cpu", "2.16.0+cu130"]))
    assert choice.pip_arguments == ("torch==2.13.0+cpu",)
    assert not choice.warning


def test_constraint_files_bound_the_cpu_build() -> None:
    choice = choose(LINUX(constraints=("<2.13",)), offers([*PYPI, "2.13.0+cpu", "2.12.1+cpu"]))
    assert choice.pip_arguments == ("torch==2.12.1+cpu",)


def test_pytorch_index_when_the_configured_sources_have_no_cpu_build() -> None:
    choice = choose(LINUX(), offers(PYPI, ["2.14.1+cpu", "2.13.0+cpu"]))
    assert choice.pip_arguments == ("torch==2.14.1+cpu", "--find-links", PYTORCH_CPU_PAGE)


def test_cuda_build_is_the_last_resort_and_loudly_so() -> None:
    choice = choose(LINUX(), offers(PYPI, []))
    assert choice.pip_arguments == (RANGE,)
    assert "SEVERAL GIGABYTES" in choice.warning
    assert "TORCH=" in choice.warning


@pytest.mark.parametrize(
    ("version", "specifier", "expected"),
    [
        ("2.10.0", ">=2.10", True),
        ("2.9.1", ">=2.10", False),  # not a comparison of strings
        ("2.13.0+cpu", ">=2.10,<3", True),
        ("2.13.0+cpu", "<=2.13", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.0+cpu", "==2.13.0+cu130", False),
        ("2.13.0", "!=2.13", False),
        ("2.13.1", "==2.13.*", True),
        ("2.1.3", "==2.13.*", False),
        ("2.13.1", "~=2.12", True),
        ("3.0", "~=2.12", False),
        ("2.14.1", "<=2.14.1", True),
        ("2.15.0", "<=2.14.1", False),
        ("2.15.0rc1", ">=2.10", False),
        ("2.15.0", "===2.15.0", False),  # an operator nobody uses here refuses instead of guessing
    ],
)
def test_satisfies(version: str, specifier: str, expected: bool) -> None:
    assert satisfies(version, specifier) is expected


def test_constraint_lines() -> None:
    lines = ["# torch<1", "torch<=2.14.1  # cap", "torchvision<1", "Torch >= 2.0, <3", "torch<2 ; python_version<'3'"]
    assert torch_choice.torch_specifiers(lines) == ["<=2.14.1", ">= 2.0, <3"]


def test_the_projects_own_range_is_read() -> None:
    assert torch_choice.project_range(ROOT / "pyproject.toml") == "torch>=2.13"


def wheel_names() -> list[str]:
    """One build for this interpreter, one for another, one that is no CPU build."""
    names = [f"torch-2.13.0+cpu-{TAG}-{TAG}-any", "torch-2.14.0+cpu-cp27-cp27m-any", f"torch-2.12.0-{TAG}-{TAG}-any"]
    return [f"{name.replace(f'{TAG}-{TAG}', f'{TAG}-none')}.whl" for name in names]


def test_discovery_in_a_find_links_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, no network: it lists what fits this interpreter, by name, without opening the wheels."""
    for name in wheel_names():
        (tmp_path / name).touch()
    (tmp_path / "caps.txt").write_text("torch<2.14\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "caps.txt"))
    assert torch_choice.offered_versions(None) == ["2.13.0+cpu", "2.12.0"]
    assert "<2.14" in torch_choice.configured_constraints()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A project page like that of PyTorch's index, on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            links = "".join(f'<a href="/{name.replace("+", "%2B")}">{name}</a>' for name in wheel_names())
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"<!DOCTYPE html><html><body>{links}</body></html>".encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/whl/cpu/torch/"
        server.shutdown()


def test_discovery_on_an_index_page(page: str) -> None:
    assert torch_choice.offered_versions(page) == ["2.13.0+cpu", "2.12.0"]


def test_an_index_out_of_reach_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert torch_choice.offered_versions("http://127.0.0.1:9/whl/cpu/torch/") == []


def test_a_pip_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, **kwargs: object) -> None:
        assert kwargs["timeout"]
        raise subprocess.TimeoutExpired("pip", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert torch_choice.offered_versions(None) == []
    assert not torch_choice.has_nvidia_gpu()


def install_with(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "deploy" / "launch" / "install" / "install.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "launch" / "install" / "install.sh", script)
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(["bash", script, "runtime"], env=environment, capture_output=True, text=True, timeout=60)


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = install_with("no-such-python", tmp_path)
    assert done.returncode == 1
    assert "there is no 'no-such-python'" in done.stderr
    assert "PYTHON=" in done.stderr


def test_an_old_python_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = install_with(str(old), tmp_path)
    assert done.returncode == 1
    assert "is Python 3.9.2, but shoal needs Python 3.11" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_once_and_again_when_the_requirements_change(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()

    def plan(*arguments: str) -> list[str]:
        command = ["make", "--dry-run", "--no-print-directory", *arguments]
        ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "TORCH")  # of the make that runs this test
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return re.findall(r"install\.sh (\w+)|(pytest.*)$", done.stdout, re.MULTILINE)

    def stamp(name: str, age_seconds: float) -> None:
        path = tmp_path / name
        path.touch()
        moment = (tmp_path / "Makefile").stat().st_mtime - age_seconds
        os.utime(path, (moment, moment))

    run = "pytest --durations=25 -n 2 --dist loadfile "
    assert plan("test", "ARGS=-x") == [("runtime", ""), ("dev", ""), ("", f"{run}-x")]
    stamp("pyproject.toml", 30)
    stamp(".venv/.installed", 20)
    stamp(".venv/.installed-dev", 10)
    assert plan("test") == [("", run)]
    assert plan("install") == []
    assert plan("install", "TORCH=2.13.0") == [("runtime", "")]
    stamp("pyproject.toml", 0)
    assert plan("test") == [("runtime", ""), ("dev", ""), ("", run)]


def jobs() -> dict[str, dict[str, Any]]:
    """The jobs of continuous integration on GitHub, by name."""
    files = [*(ROOT / ".github" / "workflows").glob("*.yml")]
    return {name: job for file in files for name, job in yaml.safe_load(file.read_text())["jobs"].items()}


def commands() -> list[str]:
    """What they run, a line each."""
    runs = (step["run"] for job in jobs().values() for step in job["steps"] if "run" in step)
    return [line.strip() for run in runs for line in re.split(r"\n|&&", run) if line.strip()]


def test_continuous_integration_runs_what_there_is() -> None:
    """Catches a job of GitHub's, which nobody runs here, that names a target, a script or an extra that is gone."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {line.removeprefix("make ") for line in commands() if line.startswith("make ")}
    assert {"lint", "test", "docs"} <= made <= targets
    paths = {word for line in commands() for word in line.split() if re.match(r"(\.ci|deploy|tests)/", word)}
    assert paths == {".ci/run", "deploy/launch/install/try_wheel.sh"}
    assert all((ROOT / path).is_file() for path in paths)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    extras = {name for line in commands() for found in re.findall(r"\.\[([\w,]+)\]", line) for name in found.split(",")}
    assert extras
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert {job["runs-on"] for job in jobs().values()} <= {"${{ matrix.os }}", "ubuntu-24.04"}


def test_the_pythons_that_are_claimed_are_tested() -> None:
    """Catches a classifier that no job stands for, and lowest dependencies that are tried with another Python."""
    named = "Programming Language :: Python :: "
    claimed = {each.removeprefix(named) for each in PROJECT["classifiers"] if each.startswith(f"{named}3.")}
    assert claimed == set(jobs()["fast"]["strategy"]["matrix"]["python"])
    [lowest] = [step["with"]["python-version"] for step in jobs()["lowest"]["steps"] if "python-version" in str(step)]
    assert PROJECT["requires-python"] == f">={lowest}"


def test_a_release_has_one_version_and_one_date() -> None:
    """Catches a version that is raised in one place and not in the others, and a release that is in no changelog."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[(.*?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1] == (PROJECT["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
