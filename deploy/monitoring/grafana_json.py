"""Panels, marks and variables in Grafana's JSON."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import Any

from shoal.deploy.monitoring.panels import Panel

SELECTION = 'job="$job", instance="$instance"'
"""Labels added to each metric of an expression: they select the run that the variables name."""
SAMPLES = re.compile(r"\b(shoal_\w+|process_\w+|scrape_\w+|up|ALERTS)\b(?:\{([^}]*)\})?")
"""Metrics of an expression, and their labels."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


def panel_json(panel: Panel, description: str) -> Json:
    """A panel without its place."""
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": description,
        "datasource": SOURCE,
        "targets": [
            _target(panel, reference, legend, expression)
            for reference, (legend, expression) in zip(string.ascii_uppercase, panel.queries.items(), strict=False)
        ],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
        **({"transformations": [_labels_only()]} if panel.kind == "table" else {}),
    }


def _target(panel: Panel, reference: str, legend: str, expression: str) -> Json:
    now = panel.kind in ("table", "bargauge")
    return {
        "refId": reference,
        "datasource": SOURCE,
        "expr": of_the_run(expression),
        "legendFormat": legend or panel.title,
        "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        "editorMode": "code",
        "instant": now,
        "range": not now,
    }


def of_the_run(expression: str) -> str:
    """The expression with every metric restricted to the run that the variables name."""
    return SAMPLES.sub(lambda found: f"{found[1]}{{{', '.join(filter(None, (SELECTION, found[2])))}}}", expression)


def _field(panel: Panel) -> Json:
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.bad_above is not None:
        steps.append({"color": "red", "value": panel.bad_above})
    field: Json = {
        "unit": panel.unit,
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.decimals is not None:
        field["decimals"] = panel.decimals
    if panel.when_empty:
        field["noValue"] = panel.when_empty
    if panel.share:
        field |= {"min": 0, "max": 1}
    if panel.kind == "timeseries":
        field["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "auto",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
            "thresholdsStyle": {"mode": "off" if panel.bad_above is None else "dashed"},
        }
    return field


def _options(panel: Panel) -> Json:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    match panel.kind:
        case "stat":
            return {"reduceOptions": last, "colorMode": "value", "graphMode": "area", "textMode": "auto"}
        case "bargauge":
            return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic", "showUnfilled": True}
        case "heatmap":
            return {
                "calculate": False,
                "cellGap": 1,
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
                "tooltip": {"mode": "single", "yHistogram": True},
                "legend": {"show": True},
            }
        case "table":
            return {"showHeader": True, "cellHeight": "sm"}
    return {
        "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _labels_only() -> Json:
    hidden = ("Time", "Value", "__name__", "job", "instance")
    return {"id": "organize", "options": {"excludeByName": dict.fromkeys(hidden, True)}}


def annotation() -> Json:
    """Marks for alerts that fire."""
    firing = of_the_run('ALERTS{alertname=~"Shoal.+", alertstate="firing"}')
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "target": {"refId": "Anno", "expr": firing, "interval": "15s"},
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}} {{policy}}",
    }


def variables() -> Iterator[Json]:
    """The choices at the top of the page: a data source, a job, a run, and one of its policies for the heatmaps."""
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}
    for name, label, query in (
        ("job", "Job", "label_values(shoal_policy_version, job)"),
        ("instance", "Run", 'label_values(shoal_policy_version{job="$job"}, instance)'),
        ("policy", "Policy of heatmaps", f"label_values(shoal_policy_version{{{SELECTION}}}, policy)"),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            # Over the time range of the page, so that runs that have ended are listed.
            "refresh": 2,
            "sort": 1,
            "multi": False,
            "includeAll": False,
        }
