"""What killed runs left of their Ray is removed, and nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal.deploy.cluster import ray_debris
from shoal.deploy.cluster.ray_debris import LOCK, claimed, claimed_when_made, remove_debris

HOLDER = """
import sys, time
from pathlib import Path
from shoal.deploy.cluster.ray_debris import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
STARTER = """
import os, sys, time
from pathlib import Path
from shoal.deploy.cluster.ray_debris import LOCK, claimed_when_made
folder = Path(sys.argv[1])
with claimed_when_made(folder):
    session = folder / f"session_2026-01-01_00-00-00_000009_{os.getpid()}"
    session.mkdir()
    while not (session / LOCK).exists():
        time.sleep(0.01)
    print("held", flush=True)
    time.sleep(600)
"""
AGENT = "import time; print('up', flush=True); time.sleep(600)"


def session(folder: Path, number: int) -> Path:
    """A directory like that of Ray's session."""
    made = folder / f"session_2026-01-01_00-00-00_{number:06}_{number}"
    (made / "logs").mkdir(parents=True)
    (made / "logs" / "raylet.out").write_text("x")
    return made


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def start(
    started: list[subprocess.Popen[str]], *arguments: str, title: str = sys.executable, log: Path | None = None
) -> subprocess.Popen[str]:
    """A process that has said that it is up; ``log``: a file that it may write."""
    with log.open("a") if log else contextlib.nullcontext() as errors:
        process = subprocess.Popen(
            [title, "-c", *arguments], executable=sys.executable, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_the_session_of_a_run_that_was_killed_while_it_started_ray_is_removed(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Catches a session that is nobody's until Ray is up: killed before, its directory stays for ever, and its
    processes for a minute."""
    starts = start(started, STARTER, str(tmp_path))
    [made] = tmp_path.iterdir()
    assert remove_debris(tmp_path) == []
    starts.kill()
    starts.wait()
    assert remove_debris(tmp_path) == [made]


@pytest.mark.parametrize("slow", [False, True])
def test_a_session_is_claimed_once_and_let_go(slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a session that is claimed twice, which is an error, or by nobody where Ray was quicker than the look; one
    of a former Ray of this process that is claimed again; and a claim that stays."""
    monkeypatch.setattr(ray_debris, "LOOK_SECONDS", 600.0 if slow else 0.001)
    before, own = session(tmp_path, os.getpid()), tmp_path / f"session_2026-01-02_00-00-00_000001_{os.getpid()}"
    with claimed_when_made(tmp_path) as settle:
        own.mkdir()
        while not slow and not (own / LOCK).exists():
            time.sleep(0.001)
        settle(own)
        assert [path.name for path in own.iterdir()] == [LOCK]
        assert LOCK not in [path.name for path in before.iterdir()]
    assert not list(own.iterdir())


def test_the_session_of_a_killed_run_is_removed_with_its_processes(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Catches directories and processes that stay, also those that Ray has given a title in the place of their options,
    and the loss of those of a run that lives, of a reader of the logs, and of others that write beside Ray."""
    dead, lives, own = (session(tmp_path, number) for number in (1, 2, 3))
    killed, _ = start(started, HOLDER, str(dead)), start(started, HOLDER, str(lives))
    agent = "ray::DashboardAgent"
    left = [
        start(started, AGENT, f"--session-dir={dead}"),
        start(started, AGENT, title=agent, log=dead / "logs" / "agent.err"),
    ]
    others = [
        start(started, AGENT, word) for word in (f"--session-dir={lives}", str(dead / "logs"), f"--session-dir={dead}2")
    ]
    others += [
        start(started, AGENT, title=agent, log=lives / "logs" / "agent.err"),
        start(started, AGENT, title=agent),
        start(started, AGENT, log=dead / "logs" / "of a script"),
    ]
    with claimed(own):
        assert remove_debris(tmp_path) == []
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert remove_debris(tmp_path) == [dead]
    assert [process.wait() for process in left] == [-signal.SIGKILL] * 2
    assert not dead.exists()
    assert (lives / "logs" / "raylet.out").read_text() == "x"
    assert [process.poll() for process in others] == [None] * len(others)
    # The logs of a run that ended by itself stay.
    assert remove_debris(tmp_path) == []
    assert sorted(path.name for path in own.iterdir()) == ["logs"]


def test_a_session_is_held_from_the_moment_that_it_has_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run whose Ray is ended by another one that starts at the same moment."""
    own, lock = session(tmp_path, 1), fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        assert remove_debris(tmp_path) == []
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(own):
        assert remove_debris(tmp_path) == []
    assert own.exists()


def test_what_is_nobodys_or_another_users_stays(tmp_path: Path) -> None:
    """Catches the removal of a session that no run of ours made, of what a link leads to, or of another user's."""
    not_ours, target = session(tmp_path, 1), session(tmp_path / "elsewhere", 2)
    (target / LOCK).touch()
    (tmp_path / "session_latest").symlink_to(target)
    linked = session(tmp_path, 3)
    (tmp_path / "outside").touch()
    (linked / LOCK).symlink_to(tmp_path / "outside")
    pipe = session(tmp_path, 4)
    os.mkfifo(pipe / LOCK)
    if os.geteuid() == 0:
        foreign = session(tmp_path, 5)
        # A container may have no other user.
        with contextlib.suppress(OSError):
            os.chown(foreign, 12345, 12345)
            (foreign / LOCK).touch()
    assert remove_debris(tmp_path) == []
    assert all(path.exists() for path in (not_ours, target, linked, pipe))
    assert os.geteuid() or foreign.exists()
    assert remove_debris(tmp_path / "missing") == []
