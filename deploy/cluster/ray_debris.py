"""What runs that were killed left of their Ray: the session's directory, and for a minute two processes.

A run holds a lock on a file in its session's directory as long as it lives, and removes the file where it ends by
itself. A later run on this machine removes the directories whose lock is free, after it has ended the processes of
Ray's that still name them. Sessions without that file, and those of other users, are nobody's here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = "shoal.lock"
LOOK_SECONDS = 0.05


@contextlib.contextmanager
def claimed(session: Path) -> Iterator[None]:
    """Hold the session's directory as this process's for the length of the block. Where the block ends, the directory
    stays; it may be removed once this process was killed in it.

    Raises:
        OSError: no file can be made there.
    """
    # Under its name it is held from the first moment: another run that starts would take a free one for debris.
    made = session / f".{LOCK}.{os.getpid()}"
    descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(session / LOCK)
        yield
    finally:
        for path in (made, session / LOCK):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def claimed_when_made(folder: Path) -> Iterator[Callable[[Path], None]]:
    """Hold the directory that Ray makes below ``folder`` for a session of this process, as soon as it is there: a
    process that is killed while it starts Ray leaves debris, too.

    Yields a function that is to be called with the session's directory once Ray is started.
    """
    sessions = f"session_*_{os.getpid()}"
    known, started = set(folder.glob(sessions)), threading.Event()
    with contextlib.ExitStack() as held:

        def claim(session: Path) -> None:
            with contextlib.suppress(OSError):  # a full disk, or it is not whole yet
                held.enter_context(claimed(session))
                known.add(session)

        def look() -> None:
            while not started.wait(LOOK_SECONDS):
                for session in set(folder.glob(sessions)) - known:
                    claim(session)

        thread = threading.Thread(target=look, name="ray-claim", daemon=True)

        def settle(session: Path) -> None:
            started.set()
            thread.join()
            if session not in known:  # else it is claimed
                claim(session)

        thread.start()
        try:
            yield settle
        finally:
            started.set()
            thread.join()


def remove_debris(folder: Path) -> list[Path]:
    """Remove what is left of sessions below ``folder`` whose runs are gone; their directories.

    What cannot be removed stays.
    """
    removed = []
    for session in sorted(folder.glob("session_*")):
        with contextlib.suppress(OSError), _taken(session):
            _end_processes(session)
            shutil.rmtree(session)
            removed.append(session)
    return removed


@contextlib.contextmanager
def _taken(session: Path) -> Iterator[None]:
    """Hold a directory that some run has left.

    Raises:
        OSError: it is none of this user's, or a run has it.
    """
    found = session.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "no session of this user", str(session))
    descriptor = os.open(session / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        held = os.fstat(descriptor)
        if not stat.S_ISREG(held.st_mode) or held.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "no session of this user", str(session))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _end_processes(session: Path) -> None:
    """End this user's processes that are Ray's and of the session, but no reader of its logs."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if entry.stat().st_uid != os.geteuid() or not _is_of(entry, session):
                continue
            process = os.pidfd_open(int(entry.name))
            try:
                # Its number may be that of another process by now.
                if _is_of(entry, session):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)


def _is_of(entry: Path, session: Path) -> bool:
    """Whether a process is Ray's and of the session: an option names it, or, where the process has put a title in the
    place of its options (``ray::DashboardAgent``), it writes files there."""
    options = (entry / "cmdline").read_bytes().split(b"\0")
    name = re.compile(re.escape(session.name.encode()) + rb"(?!\d)")
    if any(option.startswith(b"--") and name.search(option) for option in options):
        return True
    return options[0].startswith(b"ray::") and any(_written(entry, session))


def _written(entry: Path, session: Path) -> Iterator[bool]:
    """For every file of the session that a process has open: whether it may write it."""
    for link in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            if Path(os.readlink(link)).is_relative_to(session.resolve()):
                flags = re.search(r"^flags:\s*([0-7]+)", (entry / "fdinfo" / link.name).read_text(), re.M)
                yield flags is not None and bool(int(flags[1], 8) & os.O_ACCMODE)
