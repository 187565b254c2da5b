"""What environments tell beside their rows: numbers of ``info`` at an episode's end, and remarks on observations."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

MOST_NUMBERS = 32
"""Most numbers that are taken from one ``info``: each becomes a metric."""
_LONGEST_NAME = 64
_LARGEST_NUMBER = 1e300
"""Beyond it the mean of a few is infinite; NaN is below nothing."""
_NO_RESULT = frozenset(("TimeLimit.truncated",))

Remark = Literal[
    "out_of_bounds",
    "clipped",
    "undeclared",
    "dark_picture",
    "mask_not_used",
    "printed",
    "process_setting",
    "reset_key_missing",
]
"""Kinds of remarks; each has a constant where it is made."""
OUT_OF_BOUNDS: Remark = "out_of_bounds"
"""Remark: an observation leaves the bounds that its space declares."""
CLIPPED: Remark = "clipped"
"""Remark: an observation is so large that it was clipped (``envs.writers.OBSERVATION_LIMIT``)."""
UNDECLARED: Remark = "undeclared"
"""Remark: an observation has a part that its space has not."""
CODES: Remark = "dark_picture"
"""Remark: the numbers of what is read as a picture are so small that they may be codes."""


@dataclasses.dataclass(slots=True)
class Reports:
    """What was told since the last ``take``; plain data that crosses between processes."""

    counts: Counter[Remark] = dataclasses.field(default_factory=Counter)
    """Cases by remark."""
    examples: dict[Remark, str] = dataclasses.field(default_factory=dict)
    """The first case of each remark, in words."""
    episodes: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    """(slot, numbers by name) of episodes that ended and reported some."""

    def __bool__(self) -> bool:
        return bool(self.counts or self.episodes)

    def remark(self, kind: Remark, cases: int, example: str) -> None:
        """Count so many cases of a remark."""
        self.counts[kind] += cases
        self.examples.setdefault(kind, example)

    def end_episode(self, slot: int, info: Any) -> None:
        """Keep the numbers that ``info`` reports at the end of an episode."""
        if isinstance(info, Mapping) and (numbers := dict(numbers_in(info))):
            self.episodes.append((slot, numbers))

    def add(self, other: Reports, first_slot: int) -> None:
        """Add what slots from ``first_slot`` on told."""
        for kind, count in other.counts.items():
            self.remark(kind, count, other.examples[kind])
        self.episodes += [(first_slot + slot, numbers) for slot, numbers in other.episodes]

    def take(self) -> Reports:
        """Return what was told and forget it."""
        taken = Reports(self.counts, self.examples, self.episodes)
        self.counts, self.examples, self.episodes = Counter(), {}, []
        return taken


def numbers_in(info: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) of the first ``MOST_NUMBERS`` finite numbers and flags of an ``info``, also one level down.

    A number of a nested mapping is named ``outer.inner``.
    """
    left = MOST_NUMBERS
    for name, value in _flat(info):
        number = _number(value)
        if number is None or name in _NO_RESULT or len(name) > _LONGEST_NAME:
            continue
        yield name, number
        left -= 1
        if not left:
            return


def _flat(info: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        else:
            yield str(key), value


def _number(value: Any) -> float | None:
    """A single finite number; None for anything else."""
    if isinstance(value, np.ndarray):
        if value.size != 1 or value.dtype.kind not in "iufb":
            return None
        value = value.reshape(()).item()
    if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
        return None
    try:
        number = float(value)
    except OverflowError:  # Python's integers have no end
        return None
    return number if abs(number) < _LARGEST_NUMBER else None
