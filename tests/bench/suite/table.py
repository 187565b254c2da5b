"""What the trials show, one line for each environment and system: as text, or as a table in Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from shoal.deploy.monitoring.intervals import confidence_interval

from suite.rows import Row
from suite.trial import Asked, Trial


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All seeds of one system on one environment. None is what no seed gave."""

    asked: tuple[Asked, ...]
    row: str
    system: str
    recipe: str
    settings: tuple[str, ...]
    threshold: float
    budget: int
    seeds: int
    failed: int
    """Seeds whose command ended in an error; they count as not reached."""
    reached: int
    env_steps: tuple[float, float, float] | None
    """To the threshold: median, lowest and highest of the seeds that reached it."""
    seconds: tuple[float, float, float] | None
    """The same, wall clock from the command on."""
    steps_per_second: float | None
    """Median."""
    best: float | None
    """Median over seeds of the best mean in training."""
    sampled: tuple[float, float | None] | None
    """Mean over seeds of the final evaluation, and half the width of its 95% interval, which one seed has not."""
    greedy: tuple[float, float | None] | None
    random: float | None
    """Mean."""

    @property
    def name(self) -> str:
        """The system with what was set besides its defaults."""
        return " ".join(filter(None, (self.system, self.recipe, *self.settings)))


def results(trials: Iterable[Trial]) -> list[Result]:
    """In the order in which environment, system and settings come first."""
    groups: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        asked = trial.asked
        key = asked.row, asked.system, asked.recipe, asked.settings, asked.budget, asked.threshold
        groups.setdefault(key, []).append(trial)
    return [_result(group) for group in groups.values()]


def _result(group: Sequence[Trial]) -> Result:
    asked = group[0].asked
    there = [trial.reached for trial in group if trial.reached is not None]
    random = _known(trial.random for trial in group)
    return Result(
        asked=tuple(trial.asked for trial in group),
        row=asked.row,
        system=asked.system,
        recipe=asked.recipe,
        settings=asked.settings,
        threshold=asked.threshold,
        budget=asked.budget,
        seeds=len(group),
        failed=sum(bool(trial.error) for trial in group),
        reached=len(there),
        env_steps=_spread([reached.env_steps for reached in there]),
        seconds=_spread([reached.seconds for reached in there]),
        steps_per_second=_median(trial.steps_per_second for trial in group),
        best=_median(trial.best for trial in group),
        sampled=_interval(trial.sampled for trial in group),
        greedy=_interval(trial.greedy for trial in group),
        random=statistics.fmean(random) if random else None,
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _spread(values: Sequence[float]) -> tuple[float, float, float] | None:
    return (statistics.median(values), min(values), max(values)) if values else None


def _interval(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    known = _known(values)
    if not known:
        return None
    mean, half = confidence_interval(known)
    return mean, half if len(known) > 1 else None


HEAD = (
    "environment",
    "threshold, by steps",
    "system",
    "reached",
    "env steps to it",
    "seconds to it",
    "best in training",
    "final, sampled",
    "final, greedy",
    "random",
    "steps/s",
)


def cells(found: Sequence[Result], rows: dict[str, Row]) -> list[list[str]]:
    """The table below ``HEAD``."""
    return [
        [
            one.row + (" (aim)" if one.row in rows and rows[one.row].aim else ""),
            f"{one.threshold:g}, {one.budget:,}",
            one.name,
            f"{one.reached} of {one.seeds}" + (f", {one.failed} failed" if one.failed else ""),
            _several(one.env_steps, ",.0f"),
            _several(one.seconds, ",.0f"),
            _number(one.best),
            _plus_minus(one.sampled),
            _plus_minus(one.greedy),
            _number(one.random),
            "-" if one.steps_per_second is None else f"{one.steps_per_second:,.0f}",
        ]
        for one in found
    ]


def as_text(found: Sequence[Result], rows: dict[str, Row]) -> str:
    """Columns as wide as they must be."""
    table = [list(HEAD), *cells(found, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def as_markdown(found: Sequence[Result], rows: dict[str, Row]) -> str:
    """For README.md beside ``learn.py``."""
    lines = [HEAD, ["---"] * len(HEAD), *cells(found, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1 else f"{value:.2f}"


def _several(spread: tuple[float, float, float] | None, form: str) -> str:
    if spread is None:
        return "-"
    median, low, high = spread
    return f"{median:{form}}" + (f" [{low:{form}} .. {high:{form}}]" if low != high else "")


def _plus_minus(interval: tuple[float, float | None] | None) -> str:
    if interval is None:
        return "-"
    mean, half = interval
    return _number(mean) + ("" if half is None else f" +- {_number(half)}")
