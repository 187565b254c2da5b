"""The pictures of the site and of README, as SVG for a light and for a dark page.

``python -m shoal.deploy.docs.pictures`` draws all of them; with the directory of a run it first takes that
run's learning curve into ``pictures/curve.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parent / "pictures"
CURVE = PICTURES / "curve.json"
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif'"


class Palette(NamedTuple):
    """Colours for one kind of page, whose own background shows through."""

    text: str
    faint: str
    """Secondary text: at least 4.5 to 1 against the page."""
    line: str
    fill: str
    accent: str
    warm: str
    series: tuple[str, str, str]
    """Fills of three episodes, under ``text``."""


PALETTES = {
    "light": Palette(
        "#1b1f24", "#57606a", "#8c959f", "#f3f5f7", "#0a58ca", "#b3440a", ("#cfe2ff", "#ffe0c2", "#d3f0d8")
    ),
    "dark": Palette(
        "#e6edf3", "#9aa4af", "#6e7681", "#1d232b", "#79b8ff", "#ffa657", ("#1c3d6e", "#6b3d12", "#1d4f2b")
    ),
}


class Svg:
    """A drawing that grows by shapes; coordinates are in pixels of a page that is wide enough."""

    def __init__(self, width: int, height: int, title: str, palette: Palette) -> None:
        self.palette = palette
        self._parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
            f"role='img' {_FONT}>",
            f"<title>{escape(title)}</title>",
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        color: str = "",
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write a line of text; ``y`` is its baseline."""
        weight = " font-weight='600'" if bold else ""
        self._parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color or self.palette.text}' "
            f"text-anchor='{anchor}'{weight}>{escape(text)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "", line: str = "", dash: str = ""
    ) -> None:
        """Draw a rectangle with round corners."""
        self._parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='6' "
            f"fill='{fill or self.palette.fill}' stroke='{line or self.palette.line}'{_dashed(dash)}/>"
        )

    def line(
        self, points: Sequence[tuple[float, float]], *, color: str = "", width: float = 1.5, dash: str = ""
    ) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f"<polyline points='{path}' fill='none' stroke='{color or self.palette.line}' stroke-width='{width:g}' "
            f"stroke-linejoin='round'{_dashed(dash)}/>"
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], *, color: str = "") -> None:
        """Draw a straight arrow along one of the axes."""
        (x0, y0), (x1, y1) = start, end
        length = max(abs(x1 - x0), abs(y1 - y0))
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        color = color or self.palette.text
        self.line([start, (x1 - 5 * ux, y1 - 5 * uy)], color=color)
        sides = [(x1 - 8 * ux - 4 * uy, y1 - 8 * uy - 4 * ux), (x1 - 8 * ux + 4 * uy, y1 - 8 * uy + 4 * ux)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [end, *sides])
        self._parts.append(f"<polygon points='{points}' fill='{color}'/>")

    def rendered(self) -> str:
        """The file."""
        return "\n".join([*self._parts, "</svg>", ""])


def _dashed(dash: str) -> str:
    return f" stroke-dasharray='{dash}'" if dash else ""


def flow(palette: Palette) -> str:
    """The data flow of a run."""
    svg = Svg(680, 304, "Data flow: environments, rollout actors, trajectory batches, queue, learner, weights", palette)
    boxes = {
        (0, 0): ("Environments", "vectorized: one row", "per slot (agent)"),
        (1, 0): ("Rollout actors", "the policy, and one", "LSTM state per slot"),
        (2, 0): ("Trajectory batch", "T steps of all slots", "with one policy version"),
        (0, 1): ("Run directory", "checkpoints, metrics,", "evaluations"),
        (1, 1): ("Learner", "backpropagation through", "T steps, with resets"),
        (2, 1): ("Queue", "checked, counted, not", "older than the lag allows"),
    }
    width, height = 190, 84
    for (column, row), (name, *lines) in boxes.items():
        x, y = 10 + column * 235, 12 + row * 196
        svg.box(x, y, width, height)
        svg.text(x + width / 2, y + 26, name, size=16, bold=True)
        for number, text in enumerate(lines):
            svg.text(x + width / 2, y + 48 + 19 * number, text, color=palette.faint)
    svg.arrow((202, 42), (243, 42))
    svg.arrow((243, 66), (202, 66))
    svg.text(222, 34, "obs", size=13, color=palette.faint)
    svg.text(222, 83, "action", size=13, color=palette.faint)
    svg.arrow((437, 54), (478, 54))
    svg.arrow((575, 98), (575, 206))
    svg.arrow((478, 250), (437, 250))
    svg.arrow((243, 250), (202, 250))
    svg.arrow((340, 206), (340, 98), color=palette.accent)
    svg.text(352, 146, "weights: version, hash,", color=palette.accent, anchor="start")
    svg.text(352, 165, "one flat buffer", color=palette.accent, anchor="start")
    return svg.rendered()


def segment(palette: Palette) -> str:
    """A segment of twelve steps in which two episodes end."""
    steps, left, cell = 12, 88, 44
    ended, first = {3: "terminated", 8: "truncated"}, {5, 10}
    svg = Svg(680, 300, "A segment with two resets: network rows, memory, transitions and bootstrap values", palette)
    episode = [sum(t >= start for start in first) for t in range(steps + 1)]
    for label, y in (("row t", 42), ("is_first", 73), ("memory", 114), ("step", 164)):
        svg.text(left - 12, y, label, size=13, color=palette.faint, anchor="end")
    for t in range(steps + 1):
        x = left + t * cell
        last = t == steps
        svg.box(x, 24, 36, 28, fill=palette.series[episode[t]], dash="4 3" if last else "")
        svg.text(x + 18, 43, "T" if last else str(t))
        svg.text(x + 18, 73, str(int(t in first)), bold=t in first, color=palette.warm if t in first else palette.faint)
        svg.box(x, 94, 36, 30, fill=palette.fill)
        svg.text(x + 18, 114, "h, c", size=13)
        if t in first:
            svg.line([(x - 4, 86), (x - 4, 132)], color=palette.warm, width=3)
            svg.text(x - 4, 146, "zeroed", size=12, color=palette.warm)
        else:
            svg.arrow((x - 8, 109), (x, 109))
        if not last:
            void = t + 1 in first
            fill = "none" if void else palette.series[episode[t]]
            svg.box(x + 22, 152, 36, 22, fill=fill, dash="3 3" if void else "")
            color = palette.faint if void else palette.text
            svg.text(x + 40, 168, "void" if void else str(t), size=12, color=color)
    svg.text(left - 12, 131, "stored", size=12, color=palette.faint, anchor="end")
    for t, name in ended.items():
        x = left + t * cell + 40
        svg.arrow((x, 214), (x, 178), color=palette.accent)
        svg.text(x, 232, name, bold=True)
    end = left + (steps - 1) * cell + 40
    svg.arrow((end, 214), (end, 178), color=palette.accent)
    svg.text(end - 10, 232, "end of the unroll", bold=True)
    for x, lines in (
        (left + 3 * cell + 40, ("no bootstrap",)),
        (left + 8 * cell + 40, ("bootstrap with", "V(row 9), the last", "observation")),
        (end - 4, ("bootstrap with", "V(row T)")),
    ):
        for number, text in enumerate(lines):
            svg.text(x, 252 + 18 * number, text, size=13, color=palette.faint)
    return svg.rendered()


def curve(palette: Palette) -> str:
    """The learning curve of ``pictures/curve.json``."""
    recorded: dict[str, Any] = json.loads(CURVE.read_text(encoding="utf-8"))
    points, random = recorded["points"], recorded["random_return"]
    last, top = points[-1][0], 500.0
    svg = Svg(680, 330, f"Learning curve of {recorded['env_id']}: mean return against environment steps", palette)
    left, right, upper, lower = 58, 664, 40, 274

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, lower - (lower - upper) * value / top

    svg.text(left, 20, f"{recorded['env_id']}, default settings, seed {recorded['seed']}", bold=True, anchor="start")
    for value in range(0, 501, 100):
        y = at(0, value)[1]
        svg.line([(left, y), (right, y)], width=0.6)
        svg.text(left - 8, y + 5, str(value), size=13, color=palette.faint, anchor="end")
    for step in range(0, int(last) + 1, 50_000):
        anchor = "end" if at(step, 0)[0] > right - 20 else "middle"
        svg.text(at(step, 0)[0], lower + 20, f"{step:,}", size=13, color=palette.faint, anchor=anchor)
    svg.text((left + right) / 2, lower + 44, "environment steps trained", size=13, color=palette.faint)
    svg.line([at(0, random), at(last, random)], color=palette.warm, dash="5 4")
    svg.text(right, at(0, random)[1] - 8, f"random policy {random:.1f}", size=13, color=palette.warm, anchor="end")
    svg.line([at(step, value) for step, value in points], color=palette.accent, width=2.5)
    x, y = at(*points[-1])
    svg.text(
        x, y + 110, f"mean of the last 256 episodes {points[-1][1]:.0f}", size=13, color=palette.accent, anchor="end"
    )
    return svg.rendered()


DRAWN: Mapping[str, Callable[[Palette], str]] = {"flow": flow, "segment": segment, "curve": curve}


def rendered() -> dict[str, str]:
    """Every picture by file name."""
    return {f"{name}-{mode}.svg": draw(palette) for name, draw in DRAWN.items() for mode, palette in PALETTES.items()}


def take_curve(run_dir: Path) -> None:
    """Write the learning curve that ``RUN/metrics.jsonl`` holds to ``pictures/curve.json``."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    points = [[line["env_steps"], round(line["mean_return"], 1)] for line in lines if line["mean_return"] is not None]
    recorded = {
        "env_id": summary["env_id"],
        "seed": summary["seed"],
        "random_return": round(summary["random_return"], 1),
        "points": points,
    }
    CURVE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Draw every picture; the argument is a run whose learning curve is taken first."""
    for run_dir in arguments:
        take_curve(Path(run_dir))
    for name, text in rendered().items():
        (PICTURES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
