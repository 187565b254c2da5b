"""A real Prometheus with the shipped configuration, and runs for it to watch; Debian's package has promtool, too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import ALERTS, PROMETHEUS
from service import SMALL, command, wait_for

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="no promtool and prometheus in PATH: apt-get install --no-install-recommends prometheus",
)
# Shown only after an event, or with settings that this run does not have.
NOTHING_YET = {
    *("shoal_dropped_env_steps_total", "shoal_actor_recoveries_total"),
    *("shoal_evaluation_return", "shoal_evaluation_best_return", "shoal_evaluation_env_steps"),
    *("shoal_weight_clipped_ratio", "shoal_accelerator_memory_bytes", "shoal_failed_readings_total", "ALERTS"),
    *("shoal_learning_problem", "shoal_episode_metric", "shoal_callback"),
    "shoal_loss_metric",
    *("shoal_opponent_win_ratio", "shoal_opponent_return_difference", "shoal_opponent_version"),
}

# Serious alerts that only the run itself can cause: whether the disk fills up depends on the whole machine.
OF_A_RUN = {
    name: rule["expr"]
    for name, rule in ALERTS.items()
    if rule["labels"]["severity"] != "info" and name != "ShoalRunDirFillingUp"
}


def promtool(*arguments: object) -> str:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=400, cwd=PROMETHEUS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """A running Prometheus."""

    url: str
    targets: Path

    def get(self, path: str, **parameters: str) -> Any:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}{query}", timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series now, or ``at`` a Unix time."""
        try:
            data = self.get("query", query=expression, **({} if at is None else {"time": str(at)}))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error
        assert data["resultType"] == "vector", expression
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def firing(self, instance: str) -> set[str]:
        return {
            labels["alertname"] for labels, _ in self.query(f'ALERTS{{alertstate="firing", instance="{instance}"}}')
        }

    def evaluated(self) -> list[dict[str, Any]]:
        """Return all rules once each was evaluated."""

        def known() -> list[dict[str, Any]]:
            found = [rule for group in self.get("rules")["groups"] for rule in group["rules"]]
            return found if all(rule["health"] != "unknown" for rule in found) else []

        rules: list[dict[str, Any]] = wait_for(known)
        return rules

    def wait_until_quiet(self, instance: str) -> None:
        """Wait until no serious alert of a run that is well has a cause, or fires.

        Not at once, as a busy machine may be too slow for one scrape; an alert with a cause would stay.
        """
        causes: set[str] = set()

        def quiet() -> bool:
            causes.clear()
            for name, expression in OF_A_RUN.items():
                if any(labels.get("instance") == instance for labels, _ in self.query(expression)):
                    causes.add(name)
            causes.update(self.firing(instance) & OF_A_RUN.keys())
            return not causes

        try:
            wait_for(quiet)
        except AssertionError as error:
            raise AssertionError(f"still true or firing: {sorted(causes)}") from error


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, killed at the end even if it is stopped."""
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A `shoal train` in one process."""

    process: subprocess.Popen[str]
    output: Path

    def address(self) -> str:
        """Return the address of its metrics once it serves them."""

        def said() -> str | None:
            text = self.output.read_text()
            assert self.process.poll() is None, text
            found = re.search(r"metrics +http://(\S+)/metrics", text)
            return found and found[1]

        return str(wait_for(said))


@contextlib.contextmanager
def training(folder: Path, *settings: str) -> Iterator[Run]:
    """A run that would go on for ever, and whose return has a random policy's beside it."""
    folder.mkdir()
    endless = ("metrics.port=0", "mode=inline", "run_dir=run", "total_env_steps=1e12", "evaluation.random_seconds=1")
    arguments = ("train", *SMALL, *endless, *settings)
    output = folder / "said"
    with output.open("w") as said:
        process = subprocess.Popen(command(*arguments), cwd=folder, stdout=said, stderr=said, text=True)
        with ended(process):
            yield Run(process, output)


def with_tls(text: str) -> str:
    """Return the configuration with its job for TLS, uncommented."""
    lines = text.splitlines()
    begin = lines.index("  # - job_name: shoal-tls")
    end = lines.index("", begin)
    return "\n".join(line.replace("  # ", "  ", 1) if begin <= i < end else line for i, line in enumerate(lines))


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[Server]:
    """A server with the shipped configuration, rules and alerts, except that they wait for seconds only."""
    shutil.copytree(PROMETHEUS, folder, dirs_exist_ok=True)
    text = (folder / "prometheus.yml").read_text()
    config = yaml.safe_load(with_tls(text) if (folder / "tls").exists() else text)
    config["global"] = {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        # Somebody's own run may answer there.
        job.pop("static_configs", None)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    text = re.sub(r"\bfor: \w+", "for: 1s", (folder / "alerts.yml").read_text())
    text, count = re.subn(r"(shoal_last_update_timestamp_seconds > 0\)) > 300", r"\1 > 3", text)
    assert count == 1
    (folder / "alerts.yml").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, text=True)
        with ended(process):

            def ready() -> bool:
                assert process.poll() is None, (folder / "said").read_text()
                try:
                    with urllib.request.urlopen(f"{url}/-/ready", timeout=10) as response:
                        return bool(response.status == 200)
                except OSError:
                    return False

            wait_for(ready)
            yield Server(url, folder / "targets")
