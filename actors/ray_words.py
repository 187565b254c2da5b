"""Says in a line what Ray says of the end of a process in a page."""

from __future__ import annotations

import re

MOST_CHARACTERS = 600
_ENDED = re.compile(r"Worker exit type: (\w+) Worker exit detail: (.*)", re.DOTALL)
_PROCESS = re.compile(r"^\s*pid: (\d+)$", re.MULTILINE)
_WITHOUT_A_WORD = "connection error code 2"
"""The process was gone: Ray knows no more, and lists what may have been."""


def in_short(error: BaseException) -> str:
    """The error in one line of at most ``MOST_CHARACTERS``, behind the name of its class."""
    text = str(error)
    if ended := _ENDED.search(text):
        kind, detail = ended.groups()
        process = _PROCESS.search(text)
        which = f"its process {process[1]}" if process else "its process"
        if _WITHOUT_A_WORD in detail:
            return (
                f"{which} ended without an exception: it crashed, was killed (perhaps because memory ran out), or the "
                "environment ended it"
            )
        return _line(f"{which} ended ({kind}): {detail}")
    return _line(f"{type(error).__name__}: {text}")


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MOST_CHARACTERS else f"{words[: MOST_CHARACTERS - 4]} ..."
