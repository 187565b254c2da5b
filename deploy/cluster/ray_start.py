"""Notices that a process of Ray's ends while Ray is being started, before there is anything to watch it by.

Ray then waits for half a minute and raises an error, or for a minute and ends this process without one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.actors.ray_watch import RayLost

LOOK_SECONDS = 0.2
NOTICE_SECONDS = 3.0
"""How long Ray may take to notice it by itself, and to say why."""
TOO_SLOW = b"Timed out waiting for file"
"""What a raylet's log says when it ends because one of its own processes took longer than the 15 s that Ray allows."""
LAST_BYTES = 64 * 1024
PROGRAMS = {"gcs_server": "its head (GCS)", "raylet": "the raylet of this machine"}


@contextlib.contextmanager
def start_watched(gone: Callable[[str], object]) -> Iterator[None]:
    """Watch the processes that this one starts in the block, in which Ray is started.

    Args:
        gone: called with the reason, from another thread, where one ended and the block goes on. It may end the
            process.

    Raises:
        RayLost: the block raised an error after one of them had ended.
    """
    started = threading.Event()
    why: list[str] = []
    before = _started().keys()

    seen: dict[int, str] = {}
    looking = threading.Lock()

    def look() -> None:
        with looking:
            there = {pid: found for pid, found in _started().items() if pid not in before}
            ended = [name for pid, name in seen.items() if pid not in there]
            # One that ended before anybody looked is still a child that was not waited for.
            ended += [name for name, lives in there.values() if not lives]
            why.extend(PROGRAMS[name] for name in ended)
            seen.clear()
            seen.update({pid: name for pid, (name, _) in there.items()})

    def keep_looking() -> None:
        while not why and not started.wait(LOOK_SECONDS):
            look()
        if why and not started.wait(NOTICE_SECONDS):
            gone(_sentence(why[0]))

    thread = threading.Thread(target=keep_looking, name="ray-start", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        # Ray may have held the whole process, this thread and the other, until it gave up.
        look()
        if why:
            raise RayLost(f"{_sentence(why[0])} ({type(error).__name__}: {error})") from error
        raise
    finally:
        started.set()
        thread.join()


def _sentence(what: str) -> str:
    why = ""
    if what == PROGRAMS["raylet"] and _was_too_slow():
        why = (
            ", because Ray allows 15 s for the start of its own processes and this machine is too busy for that, or "
            "its disk too slow"
        )
    begun = f"Ray is lost: {what} ended while Ray was started{why}"
    return f"{begun}; nothing was trained. The same command starts Ray anew"


def _was_too_slow() -> bool:
    """Whether the log of the raylet that this process started last says so."""
    sessions = sorted(Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray").glob(f"session_*_{os.getpid()}"))
    if not sessions:
        return False
    try:
        with (sessions[-1] / "logs" / "raylet.out").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
            return TOO_SLOW in log.read()
    except OSError:
        return False


def _started() -> dict[int, tuple[str, bool]]:
    """The processes among ``PROGRAMS`` that this process has started and not waited for, and whether they live; none
    where there is no /proc."""
    found = {}
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # a thread, or a process, that has ended
            for pid in (thread / "children").read_text().split():
                with contextlib.suppress(OSError):
                    name, _, state = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
                    if name in PROGRAMS:
                        found[int(pid)] = name, state.split()[0] not in ("Z", "X")
    return found
