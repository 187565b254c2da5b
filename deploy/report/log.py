"""Warnings and errors of ``RUN/run.log``, grouped into kinds."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (WARNING|ERROR|CRITICAL|INFO|DEBUG) (\S+): (.*)")
_TOLD = ("WARNING", "ERROR", "CRITICAL")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d[\d.,]*")
MOST_KINDS, MOST_CHARACTERS = 100, 4000


@dataclasses.dataclass(slots=True)
class Complaint:
    """Log records that are equal except for numbers in their text."""

    level: str
    logger: str
    first: str
    """Local time of the first record, as the log has it."""
    last: str
    text: str
    """Text of the last record, with its traceback if it has one; at most ``MOST_CHARACTERS``."""
    count: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Complaints:
    """The warnings and errors of a log."""

    kinds: list[Complaint]
    """At most ``MOST_KINDS``, in the order of their first records."""
    warnings: int
    errors: int


class _Record(NamedTuple):
    at: str
    level: str
    logger: str
    text: str
    more: str = ""


def read_log(path: Path) -> Complaints:
    """Read a log in either format of ``log.format``; a missing file has no complaints."""
    kinds: dict[tuple[str, str, str], Complaint] = {}
    counts = dict.fromkeys(_TOLD, 0)
    current: Complaint | None = None
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                record = _record(line)
                if record is None:
                    if current:
                        _append(current, line.rstrip())
                    continue
                current = None
                if record.level not in _TOLD:
                    continue
                counts[record.level] += 1
                key = (record.level, record.logger, _NUMBER.sub("#", record.text))
                if key in kinds:
                    current = kinds[key]
                    current.last, current.count = record.at, current.count + 1
                    current.text = record.text[:MOST_CHARACTERS]
                elif len(kinds) < MOST_KINDS:
                    text = record.text[:MOST_CHARACTERS]
                    current = kinds[key] = Complaint(record.level, record.logger, record.at, record.at, text)
                if current and record.more:
                    _append(current, record.more)
    return Complaints(list(kinds.values()), counts["WARNING"], counts["ERROR"] + counts["CRITICAL"])


def _record(line: str) -> _Record | None:
    """Return the record that a line begins; None if it continues the record before."""
    if found := _LINE.match(line):
        return _Record(*found.groups())
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
        at = datetime.datetime.fromtimestamp(entry["time"]).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
        return None
    level, logger, text = (str(entry.get(key, "")) for key in ("level", "logger", "message"))
    return _Record(at, level, logger, text, str(entry.get("exception") or ""))


def _append(complaint: Complaint, line: str) -> None:
    if len(complaint.text) < MOST_CHARACTERS:
        complaint.text += f"\n{line}"[: MOST_CHARACTERS - len(complaint.text)]
