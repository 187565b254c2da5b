"""Ray is started for a run: its token, and a process of its own that ends meanwhile, said in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shoal.actors.ray_watch import RayLost
from shoal.deploy.cluster import ray_start
from shoal.deploy.cluster.ray_session import MODE, TOKEN, _own_token
from shoal.deploy.cluster.ray_start import start_watched


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process of this name, as far as the system knows."""
    processes = []

    def start(name: str) -> subprocess.Popen[bytes]:
        path = shutil.which("sleep")
        assert path is not None
        if not (tmp_path / name).exists():  # a program that runs cannot be written
            shutil.copy(path, tmp_path / name)
        processes.append(subprocess.Popen([tmp_path / name, "600"]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, tuple[str, bool]]]:
    """What the looks found so far."""
    found: list[dict[int, tuple[str, bool]]] = []
    look = ray_start._started

    def started() -> dict[int, tuple[str, bool]]:
        found.append(look())
        return found[-1]

    monkeypatch.setattr(ray_start, "_started", started)
    return found


def until_seen(looks: list[dict[int, tuple[str, bool]]], process: subprocess.Popen[bytes], *, lives: bool) -> None:
    """Wait until a look has found the process so."""
    while not any(look.get(process.pid, ("", not lives))[1] == lives for look in looks):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "words"), [("gcs_server", r"its head \(GCS\)"), ("raylet", "the raylet of this machine")]
)
@pytest.mark.parametrize("held", [False, True])
def test_an_error_after_a_process_has_ended_is_that_it_has(
    name: str,
    words: str,
    held: bool,
    program: Callable[[str], subprocess.Popen[bytes]],
    looks: list[dict[int, tuple[str, bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a start that fails with Ray's words alone, which speak of a file or of a time limit; also where Ray held
    the whole process until then, so that nobody could look."""
    monkeypatch.setattr(ray_start, "NOTICE_SECONDS", 600.0)
    monkeypatch.setattr(ray_start, "LOOK_SECONDS", 600.0 if held else ray_start.LOOK_SECONDS)
    told: list[str] = []

    def start() -> None:
        with start_watched(told.append):
            process = program(name)
            if not held:
                until_seen(looks, process, lives=True)
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            if not held:
                until_seen(looks, process, lives=False)
            raise TimeoutError("no port")

    with pytest.raises(RayLost, match=rf"{words} ended while Ray was started; .*\(TimeoutError: no port\)"):
        start()
    assert told == []


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_start_that_does_not_end_is_told(
    is_seen: bool,
    program: Callable[[str], subprocess.Popen[bytes]],
    looks: list[dict[int, tuple[str, bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a run that says nothing until Ray ends its process, a minute later; also where the program ended before
    anybody looked."""
    monkeypatch.setattr(ray_start, "NOTICE_SECONDS", 0.1)
    told: list[str] = []
    came = threading.Event()

    def gone(why: str) -> None:
        told.append(why)
        came.set()

    with start_watched(gone):
        process = program("raylet")
        if is_seen:
            until_seen(looks, process, lives=True)
        process.kill()
        assert came.wait(60)
    assert len(told) == 1
    assert "the raylet of this machine ended while Ray was started" in told[0]


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "x" * 200_000 + " C Check failed: Timed out waiting for file /tmp/ray/metrics_agent_port_1\n*** StackTrace",
            True,
        ),
        ("Timed out waiting for file" + "x" * 200_000, False),
        ("Check failed: no memory", False),
        (None, False),
    ],
)
def test_a_machine_that_is_too_busy_for_rays_start_is_said(
    log: str | None, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that ends for a reason that only Ray's logs have: one of its processes took more than 15 s."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for number, text in ((1, "Timed out waiting for file"), (2, log)):
        logs = tmp_path / "ray" / f"session_2026-01-0{number}_00-00-00_000000_{os.getpid()}" / "logs"
        logs.mkdir(parents=True)
        if text is not None:
            (logs / "raylet.out").write_text(text)
    for program, its in (("raylet", said), ("gcs_server", False)):
        sentence = ray_start._sentence(ray_start.PROGRAMS[program])
        assert ("this machine is too busy" in sentence) == its
        assert sentence.endswith("; nothing was trained. The same command starts Ray anew")


def test_a_start_that_goes_well_or_fails_by_itself_is_left_alone(
    program: Callable[[str], subprocess.Popen[bytes]], looks: list[dict[int, tuple[str, bool]]]
) -> None:
    """Catches another program's end, or an error of the settings, that is taken for the loss of Ray."""
    told: list[str] = []
    before = program("raylet")  # of somebody else's Ray
    before.kill()
    with start_watched(told.append):
        until_seen(looks, program("raylet"), lives=True)
        other = program("something")
        other.kill()
        other.wait()

    def start() -> None:
        with start_watched(told.append):
            until_seen(looks, program("gcs_server"), lives=True)
            raise ValueError("a port")

    with pytest.raises(ValueError, match="a port"):
        start()
    assert told == []


@pytest.mark.parametrize("set_up", [False, True])
def test_a_run_has_a_token_and_leaves_none(set_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a token of one run that a cluster asks for later, on every node; and one that is set up and not used."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import AuthenticationTokenLoader, Config

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(MODE, raising=False)
    file, tokens = tmp_path / ".ray" / "auth_token", AuthenticationTokenLoader.instance()
    if set_up:
        file.parent.mkdir()
        file.write_text("b" * 40)
    tokens.reset_cache()
    try:
        with _own_token(threading.Event()):
            monkeypatch.setenv(MODE, "token")  # as Ray does when it starts
            Config.initialize("")
            ensure_token_if_auth_enabled()
            found = tokens.get_raw_token(ignore_auth_mode=True)
            assert found == ("b" * 40 if set_up else os.environ[TOKEN])
        assert file.exists() == set_up
        assert tokens.has_token(ignore_auth_mode=True) == set_up
        assert TOKEN not in os.environ
        assert set_up or MODE not in os.environ
    finally:
        monkeypatch.undo()
        tokens.reset_cache()
        Config.initialize("")
