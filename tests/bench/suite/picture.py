"""The learning curves as a picture: a panel for each environment, a colour for each system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suite.curve import EPISODES, Curve
from suite.rows import Row
from suite.table import Result
from suite.trial import Trial

COLUMNS = 4
POINTS = 300
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""


class Together(NamedTuple):
    """Curves of several seeds where all of them have points."""

    env_steps: np.ndarray
    """[P]"""
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def together(curves: Sequence[Curve]) -> Together | None:
    """Mean and range over seeds; None where no environment step is common to all."""
    curves = [curve for curve in curves if len(curve.mean)]
    if not curves:
        return None
    low, high = max(c.env_steps[0] for c in curves), min(c.env_steps[-1] for c in curves)
    if low > high:
        return None
    grid = np.linspace(low, high, POINTS)
    values = np.stack([np.interp(grid, curve.env_steps, curve.mean) for curve in curves])
    return Together(grid, values.mean(0), values.min(0), values.max(0))


def draw(found: Sequence[Result], trials: Sequence[Trial], rows: dict[str, Row], path: Path) -> None:
    """Write the picture in the format that ``path`` ends with, e.g. ``.svg``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.row for one in found))
    systems = list(dict.fromkeys(one.name for one in found))
    columns = min(COLUMNS, len(names))
    lines = -(-len(names) // columns)
    # Text stays text, and the same numbers give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "shoal", "font.size": 8}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * lines + 0.6), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for name, panel in zip(names, panels, strict=False):
            _panel(panel, [one for one in found if one.row == name], trials, systems, rows[name].env_id)
        handles = [_line(name, systems) for name in systems]
        figure.legend(
            handles=handles,
            title=f"return of {EPISODES} episodes over environment steps: mean and range of the seeds; "
            "dashed: threshold, dotted: random actions",
            loc="outside lower center",
            ncols=min(4, len(systems)),
            frameon=False,
        )
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _line(name: str, systems: Sequence[str]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLORS[systems.index(name) % len(COLORS)], label=name)


def _panel(panel: Any, found: Sequence[Result], trials: Sequence[Trial], systems: Sequence[str], env_id: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for one in found:
        color = COLORS[systems.index(one.name) % len(COLORS)]
        curves = [t.curve for t in trials if t.curve is not None and t.asked in one.asked]
        if (drawn := together(curves)) is not None:
            panel.plot(drawn.env_steps, drawn.mean, color=color, linewidth=1.3)
            panel.fill_between(drawn.env_steps, drawn.low, drawn.high, color=color, alpha=0.2, linewidth=0)
        if one.random is not None:
            panel.axhline(one.random, color="0.6", linewidth=0.8, linestyle=":")
        panel.axhline(one.threshold, color="0.3", linewidth=0.8, linestyle="--")
    panel.set_title(env_id.rpartition(":")[2], fontsize=8)
    panel.set_xlim(0, max(one.budget for one in found))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.spines[["top", "right"]].set_visible(False)
