"""A plot as plain data, its form for plotly.js, and a description for people who cannot see it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from shoal.deploy.report.recorded_metrics import Numbers, thin
from shoal.deploy.report.text import clean, plotly_text

# Close to Okabe and Ito's blue, vermillion, green and purple, an olive and a violet: distinct to the colour-blind,
# and 3:1 against both backgrounds of the page.
COLORS = ("#1f83c6", "#d55e00", "#009e73", "#c066a0", "#8a7a1f", "#6d6fd1")
GREY = "#7f8790"
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 1000
STEPS = "environment steps"
LOWEST_ON_LOG_AXIS = 1e-8

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve: x and y are [N]; points that are not finite are left out."""

    name: str
    x: Numbers
    y: Numbers
    color: str = COLORS[0]
    dash: str = "solid"
    width: float = 2.0
    band: Numbers | None = None
    """[N] half widths of an interval around y."""
    points: bool = False
    """Separate points, the band as error bars."""
    steps: bool = False
    """A level that holds until the next point."""
    clock: tuple[Numbers, Numbers] | None = None
    """[K] of this plot's x, ascending, and [K] of the same moments on the other axis: steps and time."""
    quiet: bool = False
    """A reference level, left out of the description for people who cannot see the plot."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One plot. ``caption`` says what good looks like."""

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log: bool = False
    stacked: bool = False
    """Lines are shares that add up to 1."""
    share: bool = False
    """Values are shares; axis in percent."""
    y_range: tuple[float, float] | None = None
    marks: Sequence[float] = ()
    """Values of x at which the run was resumed."""
    other_label: str = ""
    """What ``Line.clock`` leads to; empty where there is no choice of the axis."""
    x_names: Sequence[str] = ()
    """Names of x = 0, 1, 2, ...; empty where x is a number."""
    whole: bool = False
    """Values are small whole numbers."""
    legend: Literal["several", "always", "shared"] = "several"
    """A legend if there are several lines, always, or one that several plots share."""

    @property
    def alt(self) -> str:
        """Describe the plot in words."""
        visible = [line for line in self.lines if not line.quiet and len(line.y)]
        parts = [f"{self.title}, {self.y_label}, over {self.x_label}."]
        for line in visible[:8]:
            y = line.y[np.isfinite(line.y)]
            if len(y):
                first, last, low, high = (self._say(float(v)) for v in (y[0], y[-1], y.min(), y.max()))
                parts.append(f"{line.name}: from {first} to {last}, lowest {low}, highest {high}.")
        if len(visible) > 8:
            parts.append(f"And {len(visible) - 8} more lines.")
        return " ".join(parts)

    def to_plotly(self) -> Json:
        """Return ``id``, ``data`` and ``layout`` for plotly.js, and ``axes`` that the page can show it over.

        An axis has its ``layout``, the ``marks`` on it, and the ``x`` of every trace where it is not that of ``data``.
        """
        traces = [(trace, line) for line in self.lines for trace in self._traces(line)]
        data = [trace for trace, _ in traces]
        found: Json = {"id": f"plot-{self.key}", "data": data, "layout": self._layout()}
        if not self.other_label:
            return found | {"axes": {}}
        other = [_on_other_axis(line, trace["x"]) for trace, line in traces]
        # Marks are moments of the whole run, whose lines have one clock.
        marks = _on_other_axis(self.lines[0], list(self.marks)) if self.marks else []
        own, away = ("steps", "time") if STEPS in self.x_label else ("time", "steps")
        found["axes"] = {
            own: {"layout": _x_axis(self.x_label), "marks": list(self.marks)},
            away: {"layout": _x_axis(self.other_label), "x": other, "marks": marks},
        }
        return found

    def _say(self, value: float) -> str:
        return f"{value:.1%}" if self.share else f"{value:.4g}"

    def _traces(self, line: Line) -> list[Json]:
        name = plotly_text(line.name)
        there = np.isfinite(line.x) & np.isfinite(line.y)
        x, y, band = line.x[there], line.y[there], None if line.band is None else line.band[there]
        if band is None and not self.stacked:
            x, y = thin(x, y, MOST_POINTS)
        if self.log:
            y = np.maximum(y, LOWEST_ON_LOG_AXIS)
        form = "%{y:.1%}" if self.share else "%{y:.4~g}"
        trace: Json = {
            "type": "scatter",
            "name": name,
            # The legend shows and hides a group together.
            "meta": clean(line.name),
            "x": rounded(x, 12),
            "y": rounded(y),
            "mode": "markers" if line.points else "lines",
            "line": {"color": line.color, "width": line.width, "dash": line.dash},
            "hovertemplate": form,
        }
        if line.steps:
            trace["line"]["shape"] = "hv"
        if len(x) == 1:
            trace["mode"] = "markers"
        if trace["mode"] == "markers":
            trace["marker"] = {"color": line.color, "size": 8, "symbol": "diamond" if line.points else "circle"}
        if self.stacked:
            trace |= {"stackgroup": "shares", "fillcolor": line.color, "line": {"color": "#ffffff", "width": 0.5}}
        if band is None:
            return [trace]
        trace["customdata"] = rounded(band)
        trace["hovertemplate"] = f"{form} \u00b1 %{{customdata:.2~g}}"
        if line.points:
            trace["error_y"] = {"type": "data", "array": rounded(band), "thickness": 1.5, "width": 3}
            return [trace]
        edge: Json = {
            "type": "scatter",
            "meta": clean(line.name),
            "x": trace["x"],
            "mode": "lines",
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
        filled = {"fill": "tonexty", "fillcolor": _faint(line.color)}
        return [edge | {"y": rounded(y - band)}, edge | {"y": rounded(y + band)} | filled, trace]

    def _layout(self) -> Json:
        axis: Json = {"showline": False, "zeroline": False, "automargin": True, "fixedrange": False}
        x = axis | _x_axis(self.x_label) | {"nticks": 6, "rangemode": "tozero"}
        y = axis | {"title": {"text": plotly_text(self.y_label), "standoff": 8}, "nticks": 6}
        if self.x_names:
            names = len(self.x_names)
            x |= {"tickvals": list(range(names)), "ticktext": list(self.x_names), "range": [-0.5, names - 0.5]}
        if self.share:
            y["tickformat"] = ".0%"
        elif not self.log and _largest(self.lines) >= 1000:
            y["tickformat"] = "~s"
        elif self.whole and _largest(self.lines) <= 6:
            y["dtick"] = 1
        if self.stacked:
            y["range"] = [0, 1]
        elif self.y_range:
            y["range"] = list(self.y_range)
        if self.log:
            y |= {"type": "log", **_log_ticks(self.lines)}
        else:
            y["rangemode"] = "tozero"
        layout: Json = {
            "xaxis": x,
            "yaxis": y,
            "height": 270,
            "margin": {"l": 56, "r": 22, "t": 14, "b": 46},
            "showlegend": False,
            "hovermode": "x unified",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12},
        }
        if self.marks:
            across: Json = {"xref": "x", "yref": "paper", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "type": "line"}
            style = {"line": {"color": GREY, "width": 1, "dash": "dot"}}
            layout["shapes"] = [across | style | {"x0": mark, "x1": mark} for mark in self.marks]
            layout["annotations"] = [
                {
                    "x": mark,
                    "y": 1,
                    "yref": "paper",
                    "yanchor": "bottom",
                    "text": "resumed",
                    "showarrow": False,
                    "font": {"size": 10},
                }
                for mark in self.marks[:4]
            ]
        return layout


def style(index: int) -> tuple[str, str]:
    """Return colour and dash of the ``index``-th line; the first 24 all look different."""
    return COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]


def rounded(values: Numbers, digits: int = 6) -> list[float | int | None]:
    """Return numbers in few characters of JSON."""
    found: list[float | int | None] = []
    for value in values.tolist():
        number = float(f"{value:.{digits}g}") if math.isfinite(value) else None
        found.append(int(number) if number is not None and number.is_integer() and abs(number) < 1e15 else number)
    return found


def _x_axis(label: str) -> Json:
    steps = STEPS in label
    return {
        "title": {"text": plotly_text(label), "standoff": 8},
        "tickformat": "~s" if steps else "",
        "hoverformat": ",d" if steps else ",.4~f",
    }


def _on_other_axis(line: Line, x: Sequence[float | int | None]) -> list[float | int | None]:
    assert line.clock is not None
    return rounded(np.interp(np.array(x, np.float64), *line.clock), 12 if line.clock[1][-1] > 1e5 else 6)


def _largest(lines: Sequence[Line]) -> float:
    return max((float(np.nanmax(np.abs(line.y))) for line in lines if np.isfinite(line.y).any()), default=0.0)


def _log_ticks(lines: Sequence[Line]) -> Json:
    """Return ticks of a log axis: powers of ten; 1, 2 and 5 below two decades; plotly.js chooses within one."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [np.ones(1)])
    values = np.maximum(values, LOWEST_ON_LOG_AXIS)
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 1.0)
    spread = math.log10(high / low)
    form = "~g" if low >= 1e-3 and high < 1e5 else ".0e"
    if spread < 1:
        return {"tickformat": form}
    return {"tickformat": form, "dtick": math.ceil(spread / 5) if spread >= 2 else "D2"}


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"
