"""A process of Ray's that ends while Ray is started: said in words, whatever Ray does then."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shoal.actors.ray_watch import RayLost
from shoal.deploy.cluster import ray_start
from shoal.deploy.cluster.ray_start import start_watched


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process of this name, as far as the system knows."""
    processes = []

    def start(name: str) -> subprocess.Popen[bytes]:
        path = shutil.which("sleep")
        assert path is not None
        shutil.copy(path, tmp_path / name)
        processes.append(subprocess.Popen([tmp_path / name, "600"]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def seen(process: subprocess.Popen[bytes]) -> None:
    """Wait until a look has found the process."""
    while process.pid not in ray_start._started():
        pass
    threading.Event().wait(2 * ray_start.LOOK_SECONDS)


@pytest.mark.parametrize(
    ("name", "words"), [("gcs_server", r"its head \(GCS\)"), ("raylet", "the raylet of this machine")]
)
def test_an_error_after_a_process_has_ended_is_that_it_has(
    name: str, words: str, program: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a start that fails with Ray's words alone, which speak of a file or of a time limit."""
    monkeypatch.setattr(ray_start, "NOTICE_SECONDS", 600.0)
    told: list[str] = []

    def start() -> None:
        with start_watched(told.append):
            process = program(name)
            seen(process)
            process.kill()
            while process.pid in ray_start._started():
                pass
            threading.Event().wait(2 * ray_start.LOOK_SECONDS)
            raise TimeoutError("no port")

    with pytest.raises(RayLost, match=rf"{words} ended while Ray was started; .*\(TimeoutError: no port\)"):
        start()
    assert told == []


def test_a_start_that_does_not_end_is_told(
    program: Callable[[str], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that says nothing until Ray ends its process, a minute later."""
    monkeypatch.setattr(ray_start, "NOTICE_SECONDS", 0.1)
    told: list[str] = []
    came = threading.Event()

    def gone(why: str) -> None:
        told.append(why)
        came.set()

    with start_watched(gone):
        process = program("raylet")
        seen(process)
        process.kill()
        assert came.wait(60)
    assert len(told) == 1
    assert "the raylet of this machine ended while Ray was started" in told[0]


def test_a_start_that_goes_well_or_fails_by_itself_is_left_alone(
    program: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    """Catches another program's end, or an error of the settings, that is taken for the loss of Ray."""
    told: list[str] = []
    with start_watched(told.append):
        seen(program("raylet"))
        other = program("something")
        other.kill()
        other.wait()

    def start() -> None:
        with start_watched(told.append):
            seen(program("gcs_server"))
            raise ValueError("a port")

    with pytest.raises(ValueError, match="a port"):
        start()
    assert told == []
