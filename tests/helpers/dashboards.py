"""The expressions of the Grafana dashboard, of Prometheus' rules and of its alerts, and the names that they read."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from shoal.deploy.monitoring import dashboard as monitoring

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
GUIDE = DEPLOY / "docs" / "monitoring.md"
GRAFANA, PROMETHEUS = DEPLOY / "monitoring" / "grafana", DEPLOY / "monitoring" / "prometheus"
AGGREGATIONS = {"sum", "min", "max", "avg", "count"}
WITH_LABELS = {"by", "without", "on", "ignoring", "group_left"}
OPERATORS = {"and", "or", "unless"}
TOKEN = re.compile(r'"[^"]*"|\[[^]]*\]|[a-zA-Z_:][\w:]*|\d[\w.+-]*|[=!]~|[=!<>]=|[-+*/(){},<>=]|\s+')


class Read(NamedTuple):
    """The samples and labels that an expression reads."""

    selectors: list[tuple[str, set[str]]]
    """Names of samples, with the labels that they are chosen by."""
    labels: set[str]
    """The labels that it groups and matches by."""


def read(expression: str) -> Read:
    """The names in a PromQL expression, told apart by what follows them."""
    found = TOKEN.findall(expression)
    assert "".join(found) == expression, f"not understood: {expression}"
    tokens = [token for token in found if not token.isspace()] + ["", ""]
    selectors, labels = [], set()
    i = 0
    while i < len(tokens) - 2:
        token, follower = tokens[i], tokens[i + 1]
        i += 1
        if not re.match(r"[a-zA-Z_:]", token) or token in AGGREGATIONS | OPERATORS:
            continue
        if token in WITH_LABELS:
            end = tokens.index(")", i)
            labels |= {word for word in tokens[i:end] if word not in "(,"}
            i = end
        elif follower == "{":
            end = tokens.index("}", i)
            chosen = {word for word, sign in itertools.pairwise(tokens[i:end]) if sign in ("=", "!=", "=~", "!~")}
            selectors.append((token, chosen))
            i = end
        elif follower != "(":  # else a function
            selectors.append((token, set()))
    return Read(selectors, labels)


def rules(file: str) -> list[dict[str, Any]]:
    """The rules in one of Prometheus' files."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


RECORDED = {rule["record"]: rule["expr"] for rule in rules("rules.yml")}
ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
BOARD: dict[str, Any] = json.loads(monitoring.DASHBOARD.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def filled(expression: str, instance: str = "127.0.0.1:9464", policy: str = "") -> str:
    """The expression with its variables filled in as Grafana does."""
    for name, value in {"$job": "shoal", "$instance": instance, "$policy": policy}.items():
        expression = expression.replace(f'"{name}"', f'"{value}"')
    return expression.replace("$__rate_interval", "1m")


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of the dashboard with its place and legend, filled in."""
    found = [
        (f"{panel['title']}: {target['legendFormat']}", target["expr"])
        for panel in PANELS
        for target in panel["targets"]
    ]
    for place, expression in [*found, *(("annotation", one["target"]["expr"]) for one in BOARD["annotations"]["list"])]:
        yield place, filled(expression)
