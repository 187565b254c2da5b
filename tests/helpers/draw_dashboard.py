"""The Grafana dashboard as a page, drawn from a live Prometheus without Grafana, to look at while it is changed:

    python tests/helpers/draw_dashboard.py --prometheus http://127.0.0.1:9090 --out dashboard.html [--minutes 5]

Panels lie where Grafana puts them, with its titles, legends, units and thresholds. It needs ``pip install
'shoal[report]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from html import escape
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "grafana" / "shoal.json"
RATE_INTERVAL, POINTS, ROW_PIXELS = "20s", 150, 30


class Prometheus:
    """A server to ask."""

    def __init__(self, url: str, minutes: float) -> None:
        self.url, self.end = url, time.time()
        self.start = self.end - 60 * minutes
        self.step = max(1.0, 60 * minutes / POINTS)
        self.job = self.labels("shoal_policy_version", "job")
        self.instance = self.labels("shoal_policy_version", "instance")
        self.policy = self.labels("shoal_policy_version", "policy")

    def ask(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
            return json.load(answer)["data"]

    def labels(self, metric: str, label: str) -> str:
        return str(self.ask("query", query=metric)["result"][0]["metric"].get(label, ""))

    def series(self, target: dict[str, Any]) -> list[tuple[str, list[float], list[float]]]:
        """(legend, seconds, values) of every series of a panel's query."""
        expression = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$__interval", RATE_INTERVAL)
        expression = expression.replace("$__range", f"{int(self.end - self.start)}s")
        for name, value in (("job", self.job), ("instance", self.instance), ("policy", self.policy)):
            expression = expression.replace(f"${name}", value)
        found = self.ask("query_range", query=expression, start=self.start, end=self.end, step=self.step)["result"]
        return [
            (
                legend(target.get("legendFormat", ""), one["metric"]),
                [at - self.end for at, _ in one["values"]],
                [float(value) for _, value in one["values"]],
            )
            for one in found
        ]


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value).replace("{{ " + name + " }}", value)
    return template.removesuffix("{{policy}}").rstrip() or ", ".join(
        f"{name}={value}" for name, value in labels.items() if name != "__name__"
    )


def shown(value: float, unit: str) -> str:
    """A number as Grafana writes it, nearly."""
    if not math.isfinite(value):
        return "-"
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "sci":
        return f"{value:.1e}"
    if unit in ("bytes", "Bps"):
        power = min(4, int(math.log2(abs(value)) / 10)) if abs(value) >= 1 else 0
        return f"{value / 2 ** (10 * power):.1f} {['', 'Ki', 'Mi', 'Gi', 'Ti'][power]}B" + "/s" * (unit == "Bps")
    text = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return text + (f" {unit}" if unit not in ("short", "none") else "")


def draw(panel: dict[str, Any], prometheus: Prometheus) -> str:
    import plotly.graph_objects as go

    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    series = [one for target in panel["targets"] for one in prometheus.series(target)]
    kind = panel["type"]
    if not series:
        return f"<p class=none>{escape(panel['fieldConfig']['defaults'].get('noValue', 'No data'))}</p>"
    if kind in ("stat", "bargauge", "table"):
        rows = [(name, shown(values[-1], unit)) for name, _, values in series]
        if kind == "stat" and len(rows) == 1:
            return f"<p class=stat>{escape(rows[0][1])}</p>"
        return "<table>" + "".join(f"<tr><td>{escape(n)}<td>{escape(v)}" for n, v in rows) + "</table>"
    figure = go.Figure()
    for name, at, values in series:
        stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
        figure.add_scatter(x=at, y=values, name=name, mode="lines", stackgroup="one" if stacked else None)
    figure.update_layout(
        height=panel["gridPos"]["h"] * ROW_PIXELS - 34,
        margin={"l": 50, "r": 6, "t": 4, "b": 24},
        legend={"orientation": "h", "y": -0.15, "font": {"size": 9}},
        font={"size": 10},
        showlegend=True,
        yaxis={"tickformat": ".0%" if unit == "percentunit" else None, "ticksuffix": "" if unit != "s" else " s"},
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False}))


def page(prometheus: Prometheus) -> str:
    from plotly.offline import get_plotlyjs

    dashboard = json.loads(DASHBOARD.read_text())
    cells = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        style = f"grid-column:{place['x'] + 1}/span {place['w']};grid-row:{place['y'] + 1}/span {place['h']}"
        inside = "" if panel["type"] == "row" else draw(panel, prometheus)
        what = "h2" if panel["type"] == "row" else "h3"
        about = escape(panel.get("description", ""))
        cells.append(
            f"<section style='{style}' title='{about}'><{what}>{escape(panel['title'])}</{what}>{inside}</section>"
        )
    css = (
        f"body{{font:12px sans-serif;margin:8px}}main{{display:grid;grid-template-columns:repeat(24,1fr);gap:4px;"
        f"grid-auto-rows:{ROW_PIXELS - 4}px}}section{{border:1px solid #ddd;overflow:hidden;padding:2px 6px}}"
        "section:has(h2){border:0}h2,h3{margin:2px}h3{font-size:12px}.stat{font-size:26px;margin:10px 4px}"
        ".none{color:#b00}td{padding:1px 8px}"
    )
    head = f"<!doctype html><meta charset=utf-8><title>{escape(dashboard['title'])}</title><style>{css}</style>"
    return f"{head}<script>{get_plotlyjs()}</script><main>{''.join(cells)}</main>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("dashboard.html"))
    options = parser.parse_args()
    options.out.write_text(page(Prometheus(options.prometheus, options.minutes)))
    print(options.out)


if __name__ == "__main__":
    main()
