"""The dashboard, the rules and the alerts where one run trains several policies, in a real Prometheus."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from dashboards import PANELS, RECORDED, filled, read
from metric_sources import make_sources
from prometheus_server import NOTHING_YET, Server, needs_prometheus, prometheus, promtool, training
from service import wait_for
from shoal.deploy.monitoring.catalogue import Sources
from shoal.deploy.monitoring.collector import RunCollector
from shoal.deploy.monitoring.dashboard import catalogued

NAMES = ("hunters", "runners")
EVERY_SECONDS, SCRAPES = 15, 21
TOGETHER = {
    *("Trained steps per second", "Trained steps", "Environment faults"),
    *("The learner's time", "The actors' time", "An actor's time", "Time left"),
}
"""Panels with a number of all policies that adds up: steps, faults of their games, and parts of the same time."""
Series = dict[frozenset[tuple[str, str]], float]
"""Values by labels, without those of the run."""


def samples(sources: Sources | Mapping[str, Sources]) -> Iterator[tuple[str, dict[str, str], float, bool]]:
    """(name, labels, value, whether it grows) of every sample of a run's page."""
    for family in RunCollector(sources).collect():
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value, family.type in ("counter", "histogram")
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_start_time_seconds"):
        yield name, {}, 5.0, name.endswith("_total")
    for name in ("process_open_fds", "process_max_fds", "up", "scrape_duration_seconds"):
        yield name, {}, 1.0, False


def history(begin: int) -> str:
    """Scrapes of three runs as OpenMetrics: ``both`` trains two policies, ``hunters`` and ``runners`` one each, with
    the numbers that each of them has in ``both``."""
    sources = dataclasses.replace(make_sources(), recoveries=lambda: 2, recovery_seconds=lambda: 9.0)
    statistics = sources.statistics
    statistics.last_update_timestamp = statistics.last_checkpoint_timestamp = begin - 60.0
    statistics.stage_seconds |= {"wait": 1.0, "update": 4.0, "reduce": 0.5, "publish": 0.25}
    both = list(samples(dict.fromkeys(NAMES, sources)))
    by_policy = {name for name, labels, *_ in both if "policy" in labels}
    pages = {"both": both, **{run: list(samples(sources)) for run in NAMES}}
    lines = []
    for run, page in pages.items():
        for name, labels, value, grows in page:
            if "runners" in (run, labels.get("policy")) and name in by_policy:
                value = runner(value)
            own = ",".join(f'{key}="{label}"' for key, label in {"job": "shoal", "instance": run, **labels}.items())
            lines += [
                f"{name}{{{own}}} {value * (scrape + 1) if grows else value} {begin + EVERY_SECONDS * scrape}"
                for scrape in range(SCRAPES)
            ]
    return "\n".join([*lines, "# EOF", ""])


def runner(value: float) -> float:
    """A number of the runners', from that of the hunters."""
    return 2 * value + 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, float]]:
    """A server that has the history of the three runs, and the time of its last scrape."""
    folder = tmp_path_factory.mktemp("recorded")
    begin = int(time.time()) - EVERY_SECONDS * SCRAPES
    (folder / "history").write_text(history(begin))
    promtool("tsdb", "create-blocks-from", "openmetrics", folder / "history", folder / "data")
    with prometheus(folder) as server:
        yield server, begin + EVERY_SECONDS * (SCRAPES - 1)


def ask(server: Server, at: float | None, target: dict[str, Any], run: str, policy: str = "") -> Series:
    found = server.query(filled(target["expr"], run, policy), at)
    assert all(labels.get("instance", run) == run for labels, _ in found)
    return {frozenset((k, v) for k, v in ls.items() if k not in ("job", "instance")): value for ls, value in found}


def of_policy(found: Series, policy: str) -> Series:
    """The series of one policy, without its name."""
    name = ("policy", policy)
    return {labels - {name}: value for labels, value in found.items() if name in labels}


def legends(panel: dict[str, Any], found: list[Series]) -> list[str]:
    """What the panel calls its series, as Grafana does: labels that a series does not have are left out."""
    return [
        re.sub(r"\{\{(\w+)\}\}", lambda name, own=dict(labels): own.get(name[1], ""), target["legendFormat"])
        for target, series in zip(panel["targets"], found, strict=True)
        for labels in series
    ]


@needs_prometheus
@pytest.mark.parametrize("panel", PANELS, ids=[f"{panel['id']}-{panel['title']}" for panel in PANELS])
def test_a_panel_shows_each_policy_as_it_shows_the_run_of_one(
    recorded: tuple[Server, float], panel: dict[str, Any]
) -> None:
    """Catches returns, entropies, lags or versions of two policies that are added up or divided by what is not theirs,
    a match of many with many, a series whose policy is not named, and numbers of the run that count twice."""
    server, at = recorded
    together = []
    for target in panel["targets"]:
        alone = {name: ask(server, at, target, name) for name in NAMES}
        if panel["type"] == "heatmap":
            # One distribution at a time, of the policy that is chosen.
            for name in NAMES:
                assert ask(server, at, target, "both", name) == alone[name] != {}
            return
        found = ask(server, at, target, "both")
        together.append(found)
        assert found or "ALERTS" in target["expr"]
        for name in NAMES:
            if own := of_policy(found, name):
                assert own == pytest.approx(alone[name], nan_ok=True)
        of_run = {labels: value for labels, value in found.items() if "policy" not in dict(labels)}
        if of_run and panel["title"] not in TOGETHER:
            assert all(entry.of_run for entry in catalogued(target["expr"]))
            assert of_run == alone["hunters"] == alone["runners"]
        elif of_run:
            assert of_run == pytest.approx(summed(panel["title"], target, server, at, alone))
    said = legends(panel, together)
    assert panel["type"] == "table" or len(set(said)) == len(said), said


def summed(
    title: str, target: dict[str, Any], server: Server, at: float, alone: Mapping[str, Series]
) -> Mapping[frozenset[tuple[str, str]], float]:
    """What all policies have together, from what a run of each would show."""
    nothing = frozenset[tuple[str, str]]()
    if title == "Time left":
        speed = {"expr": 'rate(shoal_trained_env_steps_total{job="$job", instance="$instance"}[$__rate_interval])'}
        rates = {name: ask(server, at, speed, name)[nothing] for name in NAMES}
        return {nothing: sum(alone[name][nothing] * rates[name] for name in NAMES) / sum(rates.values())}
    if target["legendFormat"] == "waiting":
        return {nothing: sum(alone[name][nothing] for name in NAMES) - 1}
    return {labels: sum(alone[name][labels] for name in NAMES) for labels in alone["hunters"]}


@pytest.mark.slow
@pytest.mark.alone
@needs_prometheus
def test_a_live_run_of_two_policies(tmp_path: Path) -> None:
    """Catches an expression that finds nothing, or fails, on what a run of two policies really serves, a rule that
    cannot be evaluated, and an alert of a run that is well."""
    settings = (
        *("env.id=pettingzoo:team_games:teams", "policies.hunters.agents=[hunter_*]", "env.num_envs=12"),
        *("policies.runners.agents=[runner_*]", "learner.batch_size=24", "learner.minibatches=2"),
        *("policy.kind=component", "policy.components={lstm: {size: 16}}", "checkpoint.every_updates=20"),
    )
    with training(tmp_path / "well", *settings) as run, prometheus(tmp_path / "prometheus") as server:
        mine = run.address()
        (server.targets / "runs.json").write_text(json.dumps([{"targets": [mine]}]))
        for metric in (
            "shoal_updates_total",
            "shoal_memory_staleness_ratio",
            "shoal_last_checkpoint_timestamp_seconds",
        ):
            wait_for(lambda metric=metric: server.query(f"count_over_time({metric}[1m]) > 4 and {metric} > 0"))
        assert {labels["policy"] for labels, _ in server.query("shoal_mean_return")} == set(NAMES)
        assert len(server.query("shoal_actors_alive")) == 1
        # Measured every learner.weight_metrics_every updates, where both losses reach the same parameters.
        nothing_yet = NOTHING_YET | {"shoal_gradient_norm"}
        empty = []
        for panel in PANELS:
            found = [ask(server, None, target, mine, "hunters") for target in panel["targets"]]
            said = legends(panel, found)
            assert panel["type"] in ("table", "heatmap") or len(set(said)) == len(said), said
            for target, series in zip(panel["targets"], found, strict=True):
                names = {name for name, _ in read(target["expr"].replace("$", "")).selectors}
                if not any(not math.isnan(value) for value in series.values()) and not names & nothing_yet:
                    empty.append((panel["title"], target["expr"]))
        assert empty == []
        rules = server.evaluated()
        assert [rule for rule in rules if rule["health"] != "ok"] == []
        for name in RECORDED:
            policies = {labels.get("policy") for labels, _ in wait_for(lambda name=name: server.query(name))}
            assert policies in ({None}, set(NAMES)), name
        server.wait_until_quiet(mine)
