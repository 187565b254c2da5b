"""Configuration, rules and alerts in a real Prometheus that watches runs; Debian's package has promtool, too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from dashboards import ALERTS, RECORDED, expressions, read
from metric_sources import make_sources
from prometheus_server import NOTHING_YET, Server, needs_prometheus, prometheus, promtool, training
from service import wait_for
from shoal.deploy.monitoring.access import AccessFiles
from shoal.deploy.monitoring.endpoint import served
from shoal.deploy.monitoring.readiness import Readiness
from shoal.deploy.settings.sections import MetricsConfig
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics


@needs_prometheus
def test_prometheus_accepts_its_configuration() -> None:
    """Catches a misspelled key, which Prometheus refuses to start with, and a file of rules that nobody loads."""
    said = promtool("check", "config", "prometheus.yml")
    assert f"{len(ALERTS)} rules found" in said
    assert f"{len(RECORDED)} rules found" in said


@needs_prometheus
def test_prometheus_accepts_the_rules() -> None:
    """Catches a rule that stands twice, a template that does not parse."""
    said = promtool("check", "rules", "rules.yml", "alerts.yml")
    assert "duplicate" not in said


@needs_prometheus
def test_alerts_fire_where_they_should() -> None:
    """Catches an alert that never comes, comes too early, or for a healthy run: by the series of alerts_test.yml."""
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


@dataclasses.dataclass(frozen=True, slots=True)
class Watched:
    """A server, a run that is well, and one whose environment will hang, or hangs already."""

    server: Server
    well: str
    hanging: str
    hanging_process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Start everything and wait until both runs are scraped; the second process is for killing."""
    folder = tmp_path_factory.mktemp("watched")
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(training(folder / "well")),
            stack.enter_context(
                training(
                    folder / "hangs",
                    "env.id=service_envs:Scripted-v0",
                    "env.kwargs={how: hangs, at: 200}",
                    "evaluation.random_seconds=0",
                )
            ),
        ]
        server = stack.enter_context(prometheus(folder / "prometheus"))
        well, hanging = (run.address() for run in runs)
        # As the guide says; the file comes while Prometheus runs.
        (server.targets / "runs.json").write_text(json.dumps([{"targets": [well, hanging]}]))
        wait_for(lambda: len(server.query('up{job="shoal"} == 1')) == 2)
        yield Watched(server, well, hanging, runs[1].process)


@pytest.mark.slow
@pytest.mark.alone
@needs_prometheus
def test_the_dashboard_on_a_live_run(watched: Watched) -> None:
    """Catches an expression that Prometheus does not understand, or that finds nothing in a run that is well."""
    server, mine = watched.server, f'instance="{watched.well}"'
    # Once there were a few scrapes, an update that measured the memory, and a checkpoint.
    wait_for(lambda: server.query(f"count_over_time(shoal_updates_total{{{mine}}}[1m]) > 4"))
    wait_for(lambda: server.query(f"shoal_memory_staleness_ratio{{{mine}}}"))
    wait_for(lambda: server.query(f"shoal_last_checkpoint_timestamp_seconds{{{mine}}} > 0"))
    asked = [(place, expression.replace("127.0.0.1:9464", watched.well)) for place, expression in expressions()]
    empty = []
    for place, expression in asked:
        found = server.query(expression)
        assert all(labels.get("instance", watched.well) == watched.well for labels, _ in found), place
        if not any(value == value for _, value in found):
            empty.append((place, expression))
    assert [place for place, e in empty if not {name for name, _ in read(e).selectors} & NOTHING_YET] == []
    # Every term of the loss is on some panel.
    losses = [expression for _, expression in asked if "shoal_loss{" in expression]
    shown = {labels["term"] for expression in losses for labels, _ in server.query(expression)}
    assert shown == {labels["term"] for labels, _ in server.query(f"shoal_loss{{{mine}}}")}


@pytest.mark.slow
@pytest.mark.alone
@needs_prometheus
def test_rules_and_alerts_on_a_live_run(watched: Watched) -> None:
    """Catches a rule that cannot be evaluated, a record whose labels differ from its name, an alert without a cause."""
    server = watched.server
    found = server.evaluated()
    assert {rule["name"] for rule in found} == {*RECORDED, *ALERTS}
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []
    for name in RECORDED:
        series = wait_for(lambda name=name: server.query(f'{name}{{instance="{watched.well}"}}'))
        level = set(name.partition(":")[0].split("_"))
        assert {frozenset(labels) for labels, _ in series} == {frozenset({"__name__", "job"} | level)}, name
    server.wait_until_quiet(watched.well)


@pytest.mark.slow
@pytest.mark.alone
@needs_prometheus
def test_prometheus_reads_with_tls_and_token(tmp_path: Path, access_files: AccessFiles, authority: trustme.CA) -> None:
    """Catches a configuration for TLS that does not fit what is served, and an announcement that Prometheus ignores."""
    folder = tmp_path / "prometheus"
    for name in ("tls", "targets-tls"):
        (folder / name).mkdir(parents=True)
    authority.cert_pem.write_to_path(folder / "tls" / "ca.crt")
    shutil.copy(access_files.token, folder / "tls" / "token")
    config = MetricsConfig(
        port=0,
        tls_certificate=str(access_files.certificate),
        tls_key=str(access_files.key),
        token_file=str(access_files.token),
        file_sd=str(folder / "targets-tls" / "run.json"),
    )
    statistics = RunStatistics(Ledger())
    ready = Readiness(
        statistics=statistics, actors_alive=lambda: 1, stopping=lambda: False, max_update_age_seconds=300.0
    )
    with prometheus(folder) as server:
        with served(config, make_sources(), ready, run="forage"):
            [(labels, value)] = wait_for(lambda: server.query('shoal_trained_env_steps_total{job="shoal"}'))
            assert (labels["run"], value) == ("forage", 60)
        wait_for(lambda: not server.query('up{job="shoal"}'))


@pytest.mark.slow
@pytest.mark.alone
@needs_prometheus
def test_alerts_of_a_run_that_hangs_and_dies(watched: Watched) -> None:
    """Catches a failed run without an alert: its environment hangs while its metrics still answer; then it dies."""
    server, mine = watched.server, watched.hanging
    wait_for(lambda: "ShoalLearnerStalled" in server.firing(mine))
    [stalled] = [one for one in server.get("alerts")["alerts"] if one["labels"]["alertname"] == "ShoalLearnerStalled"]
    assert stalled["labels"] == {
        "alertname": "ShoalLearnerStalled",
        "severity": "critical",
        "job": "shoal",
        "instance": mine,
    }
    assert re.fullmatch(rf"{re.escape(mine)} made no update for [\d.]+(m \d+)?s\.", stalled["annotations"]["summary"])
    watched.hanging_process.send_signal(signal.SIGKILL)
    wait_for(lambda: "ShoalTargetDown" in server.firing(mine))
    assert "ShoalLearnerStalled" not in server.firing(mine)
    # No more target, no more alert.
    (server.targets / "runs.json").write_text(json.dumps([{"targets": [watched.well]}]))
    wait_for(lambda: "ShoalTargetDown" not in server.firing(mine))
    wait_for(lambda: "ShoalTargetDown" not in server.firing(watched.well))
