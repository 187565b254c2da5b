"""Runs one command to its end, in a session of its own, and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE = 120.0
"""Seconds that a command has to end in good order once it was told to: a run of ours saves, and stops its Ray."""


class Failed(RuntimeError):
    """A command ended with another code than 0; the message ends with what it said last."""


def run(words: Sequence[str], *, log: Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command; what it said lies in ``log`` and is returned.

    Raises:
        Failed: it did not end with 0.
    """
    with log.open("w") as output:
        # A session of its own: a Ctrl-C at the terminal reaches this process alone, which passes it on in order.
        process = subprocess.Popen(
            words, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        seen: set[int] = set()
        try:
            while process.poll() is None:
                # What leaves its session, as Ray's processes do, is remembered while it still hangs below it.
                seen |= set(descendants(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        except BaseException:
            print("interrupted: waits until the run has ended; a second Ctrl-C kills it", flush=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            raise
        finally:
            end(process, seen)
    said = log.read_text(errors="replace")
    if process.returncode:
        raise Failed(f"ended with {process.returncode}; it said last:\n    {last_words(said)}")
    return said


def descendants(pid: int) -> list[int]:
    """``pid`` and every process below it."""
    children: dict[int, list[int]] = {}
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def end(process: subprocess.Popen[str] | subprocess.Popen[bytes], seen: set[int]) -> None:
    """Kill a command and what it started and left: its own process group, and what was seen below it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    listing = subprocess.run(["ps", "-eo", "pid="], capture_output=True, text=True, check=True).stdout
    for pid in seen & set(map(int, listing.split())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def last_words(text: str) -> str:
    """The last lines of what a command said."""
    return "\n    ".join(text.splitlines()[-15:])
