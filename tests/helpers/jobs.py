"""Jobs for processes of their own, which import this module and so nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def own_pid(_: int = 0) -> int:
    return os.getpid()


def square(number: int) -> int:
    return number * number


def raise_error(text: str) -> int:
    raise LookupError(text)


def end_itself(code: int) -> int:
    os._exit(code)


def with_a_child(marker: str) -> int:
    """Starts a process that nobody waits for, and hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    Path(marker).write_text(str(child.pid))
    time.sleep(3600)
    return 0


def is_null(stream: int) -> int:
    return os.readlink(f"/proc/self/fd/{stream}") == os.devnull
