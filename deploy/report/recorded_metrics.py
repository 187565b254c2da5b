"""Reads ``RUN/metrics.jsonl`` into columns, and joins the sessions of a resumed run."""

# N lines of the file

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MOST_COLUMNS = 5000
"""Names that are kept, each as a column of all lines: a run has some hundreds."""
REQUIRED = ("time", "session", "seconds", "env_steps")


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """The lines ``start`` to ``stop`` (exclusive), written by one process."""

    start: int
    stop: int
    first_step: float
    """Environment steps trained when this process began."""
    repeated: float
    """Environment steps trained by the process before it, not saved, and so trained again."""


class RecordedMetrics:
    """Columns of ``metrics.jsonl``; a value that is null, missing or not a number is NaN.

    Args:
        columns: by name, [N] each, including those of ``REQUIRED``, which are finite.
        skipped: number of lines that could not be read.
        torn: the last line was one of them, as a killed process leaves it.
    """

    def __init__(self, columns: dict[str, Numbers], *, skipped: int = 0, torn: bool = False) -> None:
        self._columns, self.skipped, self.torn = columns, skipped, torn
        self.steps, self.time = columns["env_steps"], columns["time"]
        self.sessions = _sessions(columns)
        self.kept = np.ones(len(self), bool)
        """[N] bool. False for lines whose work a later session discarded by starting from an earlier step."""
        self.seconds = columns["seconds"].copy()
        """[N] seconds of training since the start of the first session."""
        limit = math.inf
        for session in reversed(self.sessions):
            lines = slice(session.start, session.stop)
            self.kept[lines] = self.steps[lines] <= limit
            limit = min(limit, session.first_step)
            self.seconds[session.stop :] += columns["seconds"][session.stop - 1]

    def __len__(self) -> int:
        return len(self._columns["time"])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, in the order of their first appearance."""
        return tuple(self._columns)

    def labels(self, name: str) -> list[str]:
        """Return the label values of a metric: the parts after ``name/`` of its columns."""
        return [column.removeprefix(f"{name}/") for column in self._columns if column.startswith(f"{name}/")]

    def column(self, name: str) -> Numbers:
        """Return a column [N] as written; all NaN if it does not exist."""
        return self._columns[name] if name in self._columns else np.full(len(self), np.nan)

    def curve(self, name: str) -> tuple[Numbers, Numbers]:
        """Return environment steps and values of the kept lines that have a value."""
        values = self.column(name)
        there = self.kept & np.isfinite(values)
        return self.steps[there], values[there]

    def last(self, name: str) -> float | None:
        """Return the last value of the curve; None if it is empty."""
        values = self.curve(name)[1]
        return float(values[-1]) if len(values) else None

    def increments(self, name: str) -> Numbers:
        """Return a counter's increase [N] since the line before, or since its process began."""
        values = self.column(name)
        gained = np.diff(values, prepend=0.0)
        for session in self.sessions:
            # The column of a label begins with its first event.
            there = np.nan_to_num(values[session.start : session.stop])
            gained[session.start : session.stop] = np.diff(there, prepend=0.0)
        return gained

    def elapsed(self) -> Numbers:
        """Return seconds of training [N] since the line before, or since the process began."""
        return self.increments("seconds")

    def windows(self, most: int) -> list[slice]:
        """Return about ``most`` slices of lines at most, each within a session and none much shorter than the others.

        The last line of a run may follow the one before at once; a rate between these two would be noise.
        """
        elapsed = self.elapsed()
        shortest = max(float(np.median(elapsed)) / 2, float(elapsed.sum()) / most)
        found: list[slice] = []
        for session in self.sessions:
            start, spent, first = session.start, 0.0, len(found)
            for line in range(session.start, session.stop):
                spent += float(elapsed[line])
                if spent >= shortest and spent > 0:
                    found.append(slice(start, line + 1))
                    start, spent = line + 1, 0.0
            if start < session.stop and len(found) > first:
                found[-1] = slice(found[-1].start, session.stop)
            elif start < session.stop and elapsed[start : session.stop].sum() > 0:
                found.append(slice(start, session.stop))
        return found


def read_metrics(path: Path) -> RecordedMetrics:
    """Read ``metrics.jsonl`` line by line, so that memory holds its numbers only.

    Raises:
        OSError: it cannot be read.
        ValueError: no line can be used.
    """
    columns: dict[str, array[float]] = {name: array("d") for name in REQUIRED}
    count = skipped = 0
    torn = False
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            numbers = _numbers(line)
            if not all(math.isfinite(numbers.get(name, math.nan)) for name in REQUIRED):
                skipped += 1
                torn = not line.endswith(b"\n")
                continue
            for name, number in numbers.items():
                if name not in columns and len(columns) == MOST_COLUMNS:
                    continue
                column = columns.setdefault(name, array("d"))
                _pad(column, count)
                column.append(number)
            count += 1
    if not count:
        what = f"none of its {skipped} lines can be read" if skipped else "it is empty"
        raise ValueError(f"{path}: {what}; a run writes its first line after log.every_seconds")
    for column in columns.values():
        _pad(column, count)
    return RecordedMetrics(
        {name: np.frombuffer(column) for name, column in columns.items()}, skipped=skipped, torn=torn
    )


def read_json_lines(path: Path) -> Iterator[dict[str, float]]:
    """Yield the numbers of each readable line; none if the file does not exist."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                if numbers := _numbers(line):
                    yield numbers


def thin(x: Numbers, y: Numbers, most: int = 1000) -> tuple[Numbers, Numbers]:
    """Return at most ``most`` points: the first, last, lowest and highest of equal stretches."""
    if len(y) <= most:
        return x, y
    picked: set[int] = set()
    for part in np.array_split(np.arange(len(y)), most // 4):
        low, high = part[np.argmin(y[part])], part[np.argmax(y[part])]
        picked.update(map(int, (part[0], part[-1], low, high)))
    order = np.array(sorted(picked))
    return x[order], y[order]


def _numbers(line: bytes) -> dict[str, float]:
    """Return finite numbers by name; empty if the line is not a JSON object."""
    try:
        entry: Any = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(entry, dict):
        return {}
    found = {}
    for name, value in entry.items():
        if isinstance(value, int | float):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                found[name] = number
    return found


def _pad(column: array[float], count: int) -> None:
    column.extend([math.nan] * (count - len(column)))


def _sessions(columns: dict[str, Numbers]) -> list[Session]:
    """Return the sessions; one ends where the session number changes or ``seconds`` decreases."""
    number, seconds, steps = columns["session"], columns["seconds"], columns["env_steps"]
    starts = [0, *(np.flatnonzero((np.diff(number) != 0) | (np.diff(seconds) < 0)) + 1)]
    stops = [*starts[1:], len(number)]
    trained = np.nan_to_num(columns.get("trained_env_steps", np.zeros(len(number))))
    found: list[Session] = []
    for start, stop in zip(starts, stops, strict=True):
        # Its first line includes steps that it had trained itself by then.
        first_step = float(max(0.0, steps[start] - trained[start]))
        reached = float(steps[start - 1]) if start else first_step
        found.append(Session(int(start), int(stop), first_step, max(0.0, reached - first_step)))
    return found
