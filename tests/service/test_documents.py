"""README and the site as a reader uses them: every command and program of them runs, and the site is built."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCS, PAGES, blocks

SHELL = ("#!/bin/sh", f'exec {sys.executable} -m shoal "$@"')
SHORTENED = 'shoal() { if [ "$1" = train ]; then command shoal "$@" $SETTINGS; else command shoal "$@"; fi; }\n'
QUICK = "evaluation.random_seconds=1 learner.epochs=1"
SETTINGS = f"mode=inline total_env_steps=2000 metrics.port=-1 {QUICK}"


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment of variables in which ``shoal`` is this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "shoal"
    program.write_text("\n".join(SHELL) + "\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MINARI_DATASETS_PATH": str(tmp_path_factory.mktemp("datasets")),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, surroundings: dict[str, str]) -> Path:
    """The run that pages call RUN."""
    run = tmp_path_factory.mktemp("trained") / "RUN"
    command = ["shoal", "train", "env.id=CartPole-v1", *SETTINGS.split(), f"run_dir={run}"]
    subprocess.run(command, env=surroundings, check=True, capture_output=True, timeout=800)
    return run


def ran(command: list[str], folder: Path, surroundings: dict[str, str]) -> tuple[int, str]:
    """Exit code and all that was said."""
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=800)
    return done.returncode, done.stdout + done.stderr


def to_run(page: Path) -> bool:
    return any(block.language in ("bash", "python") and block.how not in ("not run", "file") for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.name)
def test_what_a_page_shows_runs(
    page: Path, tmp_path: Path, surroundings: dict[str, str], request: pytest.FixtureRequest
) -> None:
    """Catches a command or a program that fails as it stands on the page. Shortened are only the numbers of steps."""
    found = blocks(page)
    for block in found:
        if block.how == "file":
            (tmp_path / block.what).write_text(block.code)
    if any(re.search(r"\bRUN\b", block.code) for block in found if block.language == "bash" and not block.how):
        (tmp_path / "RUN").symlink_to(request.getfixturevalue("trained"))
    for block in found:
        if block.language == "bash" and block.how in ("", "run with", "fails"):
            extra = f"{block.what} {QUICK}" if block.how == "run with" else ""
            code, said = ran(
                ["bash", "-euo", "pipefail", "-c", SHORTENED + block.code],
                tmp_path,
                {**surroundings, "SETTINGS": extra},
            )
            assert code == (int(block.what) if block.how == "fails" else 0), f"{block.place}: {said}"
            shown = found[found.index(block) + 1] if block.how == "fails" else None
            assert shown is None or shown.code == said, f"{block.place} shows other words than {said}"
    program = "\n".join(block.code for block in found if block.language == "python" and not block.how)
    if program:
        (tmp_path / "page.py").write_text(re.sub(r"total_env_steps=[0-9_]+", "total_env_steps=2_000", program))
        code, said = ran([sys.executable, "page.py"], tmp_path, surroundings)
        assert code == 0, f"{page.name}: {said}"


def test_the_site_is_built_without_a_warning(tmp_path: Path, surroundings: dict[str, str]) -> None:
    """Catches a page that no other leads to, a link to nowhere, and a docstring that is not read as it is meant."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir", str(tmp_path / "doctrees")]
    code, said = ran([sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")], DOCS, surroundings)
    assert code == 0, said
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in (tmp_path / "site").glob("*.html")}
    settings = (tmp_path / "site" / "settings.html").read_text()
    assert "Segments (unroll_length steps of one slot) per update" in settings
    # Nothing of another host: the site is read without a network, too.
    for page in (tmp_path / "site").glob("*.html"):
        assert (
            re.findall(
                r"<(?:script|img)[^>]*src=\"https?:|<link[^>]*rel=\"stylesheet\"[^>]*href=\"https?:", page.read_text()
            )
            == []
        )
