"""Compares runs. Runs that differ only in their seed form a group, whose mean has a confidence interval."""

# R runs of a group, P points

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from shoal.deploy.monitoring.intervals import t_quantile
from shoal.deploy.report.recorded_metrics import Numbers
from shoal.deploy.report.recorded_run import RecordedRun

POINTS = 300
WITHOUT_INFLUENCE = ("seed", "run_dir", "resume", "metrics", "log")
"""Settings in which the runs of a group may differ: the seed, and settings that do not affect learning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Runs whose settings are equal except for the seed."""

    name: str
    runs: Sequence[RecordedRun]
    settings: Mapping[str, str]
    """The settings in which groups differ, by dotted name; ``-`` if the group does not have the setting."""

    @property
    def seeds(self) -> list[str]:
        """The seeds of the runs, sorted as numbers."""
        return sorted((str(run.setting("seed")) for run in self.runs), key=lambda s: (len(s), s))


class Band(NamedTuple):
    """Mean of a group's curves with its 95% interval, where all of them have data."""

    x: Numbers
    """[P]"""
    mean: Numbers
    """[P]"""
    half_width: Numbers | None
    """[P]; None for a single curve."""


def group_runs(runs: Sequence[RecordedRun]) -> list[Group]:
    """Return the groups in the order of their first runs."""
    settings = [flatten(run.config) for run in runs]
    groups: list[tuple[dict[str, str], list[RecordedRun]]] = []
    for run, flat in zip(runs, settings, strict=True):
        mine = {k: v for k, v in flat.items() if k.split(".")[0] not in WITHOUT_INFLUENCE}
        # The group of a run without config.yaml is unknown.
        members = next((members for theirs, members in groups if mine and theirs == mine), None)
        if members is None:
            groups.append((mine, [run]))
        else:
            members.append(run)
    names = dict.fromkeys(name for flat, _ in groups for name in flat)
    differing = [name for name in names if len({flat.get(name, "-") for flat, _ in groups}) > 1]
    found = []
    for index, (flat, members) in enumerate(groups):
        mine = {name: flat.get(name, "-") for name in differing}
        found.append(Group(_name(index, mine, members, alone=len(groups) == 1), members, mine))
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as texts by dotted name."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def band(curves: Sequence[tuple[Numbers, Numbers]], points: int = POINTS) -> Band | None:
    """Return the mean of R curves (x ascending, y), interpolated onto common x; None if they share no x."""
    if not curves or any(len(x) == 0 for x, _ in curves):
        return None
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low > high:
        return None
    grid = np.linspace(low, high, points) if high > low else np.array([low])
    if len(curves) == 1:
        return Band(*curves[0], None)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    half = t_quantile(len(curves) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(curves))
    return Band(grid, values.mean(axis=0), half)


def common_end(runs: Sequence[RecordedRun]) -> float:
    """Return the last environment step that all runs reached."""
    return min(float(run.metrics.steps[-1]) for run in runs)


def value_at(run: RecordedRun, key: str, step: float) -> float | None:
    """Return a curve's value at an environment step; None outside the curve."""
    x, y = run.metrics.curve(key)
    return float(np.interp(step, x, y)) if len(x) and x[0] <= step <= x[-1] else None


def rate_curve(run: RecordedRun, key: str, most: int = 200) -> tuple[Numbers, Numbers]:
    """Return a counter's increase per second of training, over environment steps."""
    metrics = run.metrics
    gained, elapsed = metrics.increments(key), metrics.elapsed()
    windows = [w for w in metrics.windows(most) if metrics.kept[w].all()]
    y = [float(gained[w].sum() / elapsed[w].sum()) for w in windows]
    return metrics.steps[[w.stop - 1 for w in windows]], np.array(y)


Curve = Callable[[RecordedRun], tuple[Numbers, Numbers]]


def _name(index: int, settings: Mapping[str, str], runs: Sequence[RecordedRun], *, alone: bool) -> str:
    if alone:
        return "all runs" if len(runs) > 1 else runs[0].name
    letter = chr(ord("A") + index) if index < 26 else f"#{index + 1}"
    shown = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in list(settings.items())[:2])
    shown = shown if len(shown) <= 48 else f"{shown[:45]}..."
    more = ", ..." if len(settings) > 2 else ""
    return f"{letter}: {shown}{more}" if shown else f"{letter}: {runs[0].name}"
