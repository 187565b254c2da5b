"""The Grafana dashboard, Prometheus' rules and alerts, and the guide: read against the catalogue, without a server."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from dashboards import (
    ALERTS,
    BOARD,
    GRAFANA,
    GUIDE,
    PANELS,
    PROMETHEUS,
    RECORDED,
    ROOT,
    expressions,
    read,
    rules,
)
from rollouts import RUN, SMALL
from shoal.deploy.monitoring import dashboard as monitoring
from shoal.deploy.monitoring import metrics_table
from shoal.deploy.monitoring.catalogue import CATALOGUE, INFO, CatalogueEntry, Sources
from shoal.deploy.monitoring.collector import RunCollector
from shoal.deploy.monitoring.grafana_json import SELECTION
from shoal.deploy.placement.versions import versions
from shoal.deploy.settings.load import to_dict
from shoal.deploy.settings.sections import Config
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics
from shoal.learner.trajectory_queue import TrajectoryQueue

# What Prometheus adds to every scrape, the client library to the page, and other exporters have: with their own labels.
OTHERS: dict[str, set[str]] = {
    **{f"process_{name}": set() for name in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds")},
    **{f"process_{name}": set() for name in ("open_fds", "max_fds")},
    **{name: set() for name in ("up", "scrape_duration_seconds")},
    **{f"node_filesystem_{name}_bytes": {"mountpoint", "fstype", "device"} for name in ("avail", "size")},
    "ALERTS": {"alertname", "alertstate", "severity", "policy"},
    "shoal_build_info": set(versions()),
    **{name: set() for name in INFO if name != "shoal_build_info"},
}
EVERYWHERE = [*expressions(), *RECORDED.items(), *((name, rule["expr"]) for name, rule in ALERTS.items())]


@pytest.fixture(scope="module")
def page() -> dict[str, set[str]]:
    """Return the names of samples that a run's page can have, with their labels."""
    ledger = Ledger()
    trajectory_queue = TrajectoryQueue(
        SMALL, run_id=RUN, num_actors=1, num_envs=4, batch_size=4, max_policy_lag=1, ledger=ledger
    )
    sources = Sources(
        statistics=RunStatistics(ledger),
        trajectory_queue=trajectory_queue,
        actors_alive=lambda: 0,
        actor_restarts=dict,
        bottleneck=lambda: None,
        build=versions(),
    )
    found = {entry.name: {entry.label} - {None} for entry in CATALOGUE if entry.kind != "histogram"}
    # A histogram with negative buckets has neither a sum nor a count.
    for family in RunCollector(sources).collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def labels_of(name: str, page: dict[str, set[str]]) -> set[str] | None:
    """Return the labels of a sample; None if it does not exist."""
    if name in RECORDED:
        return {*name.partition(":")[0].split("_"), "job", *({"policy"} & _kept(RECORDED[name], page))}
    own = page.get(name, OTHERS.get(name))
    if own is None:
        return None
    by_policy = any(not entry.of_run for entry in monitoring.catalogued(name))
    return own | {"job", "instance"} | ({"policy"} if by_policy else set())


def _kept(rule: str, page: dict[str, set[str]]) -> set[str]:
    """Labels of what a rule reads, without those that it sums over or leaves out of a match."""
    found = re.findall(r"(?:without|ignoring) \((.*?)\)", rule)
    summed = {label for labels in found for label in labels.split(", ")}
    return set().union(*(labels_of(name, page) or set() for name, _ in read(rule).selectors)) - summed


def problems(expression: str, page: dict[str, set[str]]) -> list[str]:
    """Return names and labels of an expression that do not exist."""
    found = read(expression)
    known = {name: labels_of(name, page) for name, _ in found.selectors}
    wrong = [name for name, labels in known.items() if labels is None]
    wrong += [f"{name}{{{label}}}" for name, chosen in found.selectors for label in chosen - (known[name] or chosen)]
    every = set().union(*(labels or set() for labels in known.values()))
    return wrong + sorted(found.labels - every)


def test_the_dashboard_is_what_the_generator_makes() -> None:
    """Catches a dashboard file older than metrics, help texts or layout: `python -m shoal.deploy.monitoring`."""
    assert monitoring.DASHBOARD.read_text(encoding="utf-8") == monitoring.rendered()


@pytest.mark.parametrize(("place", "expression"), EVERYWHERE, ids=[place for place, _ in EVERYWHERE])
def test_expressions_read_what_there_is(place: str, expression: str, page: dict[str, set[str]]) -> None:
    """Catches a metric or label that was renamed or never was: a panel that stays empty, an alert that never comes."""
    assert problems(expression, page) == []
    used = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", place))
    assert used <= set().union(*(labels_of(name, page) or set() for name, _ in read(expression).selectors))


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("rate(shoal_update_total[5m])", ["shoal_update_total"]),
        ("shoal_episode_return_sum", ["shoal_episode_return_sum"]),
        ("shoal_episode_length_steps", ["shoal_episode_length_steps"]),
        ('shoal_loss{stage=~"a|b", job="x"} > 1e-4', ["shoal_loss{stage}"]),
        ("max without (policy) (shoal_actors_alive)", ["policy"]),
        ("sum by (le, reason) (shoal_episode_return_bucket)", ["reason"]),
        ("instance:shoal_updates:rate5m / ignoring (stage) group_left () (up > 0)", ["stage"]),
        ("instance:shoal_updates:rate1m", ["instance:shoal_updates:rate1m"]),
    ],
)
def test_what_is_wrong_is_seen(expression: str, wrong: list[str], page: dict[str, set[str]]) -> None:
    """Catches a check that lets everything pass."""
    assert problems(expression, page) == wrong


def test_every_metric_is_shown(page: dict[str, set[str]]) -> None:
    """Catches a metric that is measured, served, stored, and seen by nobody."""
    shown = {name for _, expression in expressions() for name, _ in read(expression).selectors}
    for entry in CATALOGUE:
        names = {entry.name} if entry.kind != "histogram" else {f"{entry.name}_bucket"}
        assert names <= shown, entry.name
    assert {"shoal_build_info", "process_resident_memory_bytes", "up"} <= shown
    described = "\n".join(panel["description"] for panel in PANELS)
    assert [entry.name for entry in CATALOGUE if f"`{entry.name}`: {entry.help}" not in described] == []


@pytest.mark.parametrize(
    ("kind", "name", "label", "expression", "unit"),
    [
        ("counter", "shoal_new_bytes_total", None, "rate(shoal_new_bytes_total{%s}[$__rate_interval])", "Bps"),
        ("gauge", "shoal_new_ratio", "part", "shoal_new_ratio{%s}", "percentunit"),
        ("gauge", "shoal_new_timestamp_seconds", None, "time() - (shoal_new_timestamp_seconds{%s} > 0)", "s"),
        (
            "histogram",
            "shoal_new_seconds",
            None,
            'sum by (le) (increase(shoal_new_seconds_bucket{%s, policy="$policy"}[$__rate_interval]))',
            "s",
        ),
    ],
)
def test_a_new_metric_gets_a_panel(
    monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, label: str | None, expression: str, unit: str
) -> None:
    """Catches a metric that is forgotten because nobody found a place for it."""
    entry = CatalogueEntry(kind, name, "A new thing.", lambda sources: 0, label)
    monkeypatch.setattr(monitoring, "CATALOGUE", (*CATALOGUE, entry))
    *_, row, panel = monitoring.dashboard()["panels"]
    assert (row["type"], row["title"]) == ("row", "More")
    [target] = panel["targets"]
    assert target["expr"] == expression % SELECTION
    assert panel["fieldConfig"]["defaults"]["unit"] == unit
    assert "A new thing." in panel["description"]


def test_panels_lie_side_by_side() -> None:
    """Catches panels over one another, or out of the grid, which Grafana moves to where nobody looks for them."""
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= monitoring.COLUMNS
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    wanted = ["Overview", "Step accounting", "Speed by stage", "Policy lag and queue", "Losses"]
    assert titles == [*wanted, "Memory", "Is it learning?", "Episodes", "Weights", "Process"]


def test_units_are_those_of_the_metrics() -> None:
    """Catches seconds drawn as a share, bytes as a count, an axis without a unit."""
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    for place, expression in expressions():
        panels = [panel for panel in PANELS if place.startswith(f"{panel['title']}: ")]
        for unit in (panel["fieldConfig"]["defaults"]["unit"] for panel in panels):
            names = {name for name, _ in read(expression).selectors}
            if any("_bytes" in name for name in names):
                assert unit == ("Bps" if "rate(" in expression else "bytes"), place
            if any(name.endswith("_timestamp_seconds") for name in names):
                assert unit == "s", place
            if any(name.endswith("_ratio") for name in names):
                assert unit == "percentunit", place
            # A value as it is served, not one that the expression computes.
            if re.fullmatch(r"shoal_\w+(\{[^}]*\})?", expression) and unit == "percentunit":
                assert all(name.endswith("_ratio") for name in names), place


def test_variables_are_defined() -> None:
    """Catches a panel that asks for a variable that the dashboard does not have, and shows all runs at once."""
    defined = {variable["name"] for variable in BOARD["templating"]["list"]}
    assert defined == {"datasource", "job", "instance", "policy"}
    text = json.dumps(BOARD)
    assert set(re.findall(r"\$\{?([a-z]\w*)", text)) == defined
    for panel in PANELS:
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        for target in panel["targets"]:
            assert all({"job", "instance"} <= chosen for _, chosen in read(_plain(target["expr"])).selectors), panel[
                "title"
            ]


def _plain(expression: str) -> str:
    return expression.replace("$", "")


def test_recorded_names_follow_the_rules_of_prometheus() -> None:
    """Catches a record that is taken for a metric, or two of one name."""
    names = [rule["record"] for rule in rules("rules.yml")]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z_]+:shoal_[a-z_]+:[a-z0-9]+", name)
        [metric] = re.findall(r":(\w+):", name)
        assert any(entry.name.startswith(metric) for entry in CATALOGUE), name
        [expression] = [rule["expr"] for rule in rules("rules.yml") if rule["record"] == name]
        windows = set(re.findall(r"\[(\w+)\]", expression))
        assert windows == set(re.findall(r"\d+m$", name)), f"{name} says another time than it looks back"


def _settings(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_what_to_do(name: str, page: dict[str, set[str]]) -> None:
    """Catches an alert that nobody can act on, names a setting that there is not, or shows `<no value>`."""
    rule = ALERTS[name]
    assert name.startswith("Shoal")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    labels = set().union(*(labels_of(metric, page) or set() for metric, _ in read(rule["expr"]).selectors))
    settings = set(_settings(to_dict(Config())))
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    of_policy = "{{ with $labels.policy }} ({{ . }}){{ end }}"
    # The label is of a target that `metrics.file_sd` names.
    of_run = "{{ with $labels.run }}{{ . }} at {{ end }}"
    of_a_run = all(
        metric.startswith(("shoal_", "up", "process_", "instance")) for metric, _ in read(rule["expr"]).selectors
    )
    assert rule["annotations"]["summary"].startswith(of_run) == of_a_run
    assert (of_policy in rule["annotations"]["summary"]) == ("policy" in _kept(rule["expr"], page))
    for text in rule["annotations"].values():
        for template in re.findall(r"\{\{(.*?)\}\}", text.replace(of_policy, "").replace(of_run, "")):
            value, *functions = (word.strip() for word in template.split("|"))
            assert value == "$value" or value.removeprefix("$labels.") in labels
            assert set(functions) <= {"humanize", "humanizeDuration", "humanizePercentage"}
        assert set(re.findall(rf"\b(?:{sections})\.[a-z_]\w*", text)) - {"run.log"} <= settings
        for alert in re.findall(r"\bShoal\w+", text):
            assert alert in ALERTS
    assert re.search(r"\b[a-z]+\.[a-z_]+\b", rule["annotations"]["description"]), "no setting, and no file to look at"


def test_every_alert_has_a_test() -> None:
    """Catches an alert that was never seen to fire."""
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {
        re.findall(r'alertname="(\w+)"', sample["labels"])[0]
        for test in tests
        for one in test["promql_expr_test"]
        for sample in one["exp_samples"]
        if "ALERTS" in one["expr"]
    }
    assert fired == set(ALERTS)


def test_the_compose_file_finds_everything() -> None:
    """Catches a file that is mounted and not there, a provisioned folder that is empty, a version that is `latest`."""
    services = yaml.safe_load((GRAFANA / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounted = {}
    for service in services.values():
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        for source, target, *_ in (volume.split(":") for volume in service["volumes"]):
            if source.startswith("."):
                mounted[target] = (GRAFANA / source).resolve()
    assert mounted["/etc/prometheus"] == PROMETHEUS
    assert mounted["/var/lib/grafana/dashboards/shoal.json"] == monitoring.DASHBOARD.resolve()
    provisioning = mounted["/etc/grafana/provisioning"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "shoal.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/shoal.json" in mounted
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    [address] = [word for word in services["prometheus"]["command"] if "listen-address" in word]
    assert source["url"] == "http://" + address.partition("=")[2]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    [shoal] = [job for job in config["scrape_configs"] if job["job_name"] == "shoal"]
    defaults = Config().metrics
    assert shoal["static_configs"] == [{"targets": [f"{defaults.address}:{defaults.port}"]}]


def test_the_guide_names_what_there_is() -> None:
    """Catches a file or an alert in the guide that is not there, or an alert that the guide forgets."""
    text = GUIDE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(Shoal\w+)`", text, re.MULTILINE) == list(ALERTS)
    for name, severity in re.findall(r"^\| `(Shoal\w+)` \| (\w+)", text, re.MULTILINE):
        assert ALERTS[name]["labels"]["severity"] == severity
    paths = set(re.findall(r"\b(?:deploy|tests)/[\w./]+\w", text)) - {"deploy/monitoring/prometheus/targets/runs.json"}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert [path for path in re.findall(r"\]\(([^):#]+)\)", text) if not (GUIDE.parent / path).exists()] == []
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module)
    for metric in set(re.findall(r"\bshoal_[a-z]\w*", text)):
        assert metric in {entry.name for entry in CATALOGUE} | set(INFO)


def test_the_table_of_metrics_is_up_to_date() -> None:
    """Catches a metric that the guide forgets, or describes as it was: `python -m shoal.deploy.monitoring`."""
    text = metrics_table.GUIDE.read_text(encoding="utf-8")
    assert text == metrics_table.rendered(text)
    for entry in CATALOGUE:
        assert f"| `{entry.name}` | {entry.kind} | {f'`{entry.label}`' if entry.label else ''} | " in text
    with pytest.raises(ValueError, match="expected"):
        metrics_table.rendered("a guide")
