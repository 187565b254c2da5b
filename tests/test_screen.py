"""The screen of a run is no point of failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAY = r"""
import sys
from shoal.deploy import cli
from shoal.deploy.training.screen import Screen
from rich.console import Console
def train(_):
    console = Console(file=Screen(), highlight=False)
    for i in range(20000):
        console.print(f"line {i} r\u00e9sum\u00e9 \u2581", markup=False, soft_wrap=True)
    open(sys.argv[1], "w").write("trained")
    return 0
cli._train = train
sys.exit(cli.main(["train"]))
"""
PRINT = r"""
import sys
from shoal.deploy import cli
def show(_):
    for i in range(20000):
        print("line", i, "r\u00e9sum\u00e9")
    return 0
cli._show = show
sys.exit(cli.main(["config", "show"]))
"""
SHOAL = Path(__file__).resolve().parent.parent / ".venv" / "src"


def run(script, out, mark, **environment):
    paths = os.pathsep.join(p for p in (str(SHOAL), *sys.path) if p)
    return subprocess.run(
        [sys.executable, "-c", script, str(mark)],
        stdout=out,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        timeout=200,
        check=False,
    )


def read_three(script, mark):
    """As ``| head -3``."""
    read, write = os.pipe()
    with subprocess.Popen(["head", "-3"], stdin=read, stdout=subprocess.PIPE) as head:
        os.close(read)
        done = run(script, write, mark)
        os.close(write)
        lines = head.communicate()[0].splitlines()
    return done, lines


def test_a_reader_that_has_read_enough_ends_nothing(tmp_path):
    """`shoal train | head -3`: exit 1 without a word, or a run that ends."""
    for script, trains in ((SAY, True), (PRINT, False)):
        done, lines = read_three(script, tmp_path / "mark")
        assert (done.returncode, done.stderr, len(lines)) == (0, b"", 3)
        if trains:
            assert (tmp_path / "mark").read_text() == "trained"


def test_a_full_disk_behind_the_screen_ends_no_run(tmp_path):
    """`shoal train > /dev/full`; what prints its result, though, has failed."""
    with open("/dev/full", "w") as full:
        done = run(SAY, full, tmp_path / "mark")
        assert (done.returncode, done.stderr) == (0, b"")
        assert (tmp_path / "mark").read_text() == "trained"
        done = run(PRINT, full, tmp_path / "mark")
    assert done.returncode == 1
    assert b"shoal: the output could not be written: " in done.stderr or b"No space left" in done.stderr


@pytest.mark.parametrize("script", [SAY, PRINT])
def test_an_encoding_that_lacks_a_character_ends_nothing(tmp_path, script):
    """A run directory with an accent, on a terminal in ASCII."""
    with (tmp_path / "out").open("w") as out:
        done = run(script, out, tmp_path / "mark", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 20000
    assert lines[7].startswith("line 7 r\\xe9sum\\xe9")
