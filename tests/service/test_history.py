"""``RUN/metrics.jsonl``, the trackers that get the same lines, and output as JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from metric_sources import make_sources
from service import SMALL, read_summary, shoal, wait_for
from shoal.deploy.monitoring import sinks as sinks_module
from shoal.deploy.monitoring.catalogue import CATALOGUE
from shoal.deploy.monitoring.history import CatalogueReader, MetricsHistory
from shoal.deploy.monitoring.sinks import LoggedRun, Sink, SinkThread, check_sinks, make_sinks
from shoal.deploy.settings.sections import LogConfig, SinkConfig

INLINE = (*SMALL, "mode=inline", "run_dir=run", "learner.weight_metrics_every=5", "log.every_seconds=0.2")


def lines_of(run: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(tmp_path: Path, *settings: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    done = shoal("train", *INLINE, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return lines_of(tmp_path / "run"), read_summary(tmp_path / "run")


class Broken:
    """Sources of which all readings but one fail."""

    failed_readings: ClassVar[Counter[str]] = Counter()

    class statistics:
        policy_version = 7
        seconds = 5.0
        max_log_prob_error = math.nan

    class ledger:
        trained = 3


def test_the_history_tells_what_the_summary_tells(tmp_path: Path) -> None:
    """Catches a metric that is not written, a last line from before the end, counters that fall, a mean over the whole
    run in place of the last seconds; a resumed run that overwrites what was."""
    lines, summary = train(tmp_path, "total_env_steps=8000")
    first, last = lines[0], lines[-1]
    assert len(lines) > 2
    assert last["env_steps"] == summary["env_steps"] == last["trained_env_steps"]
    assert last["policy_version"] == summary["policy_version"] == last["updates"]
    assert last["sampled_env_steps"] == summary["ledger"]["sampled"]
    assert last["in_flight_env_steps"] == 0  # after the pool was closed
    assert last["log_prob_error_max"] == pytest.approx(summary["max_log_prob_error"])
    for entry in CATALOGUE:
        name = entry.history_name
        if entry.kind == "histogram":
            assert {f"{name}/count", f"{name}/mean", f"{name}/max"} <= last.keys()
        elif not entry.label:
            assert name in last
        if entry.kind == "counter" and not entry.label:
            assert all(a[name] <= b[name] for a, b in itertools.pairwise(lines)), name
    assert {"loss/policy_loss", "stage_seconds/update", "bottleneck/learner"} <= last.keys()
    assert any(name.startswith("weight_norm/") for name in last)
    seconds = [line["process_cpu_seconds"] for line in lines]
    assert 0 <= seconds[0] < seconds[-1]
    assert seconds == sorted(seconds)
    assert 2**26 < last["process_resident_memory_bytes"] < 2**36
    # Means of the stretches, weighted with their episodes, are the mean of all.
    counts = [0] + [line["episode_length_steps/count"] for line in lines]
    means = [line["episode_length_steps/mean"] for line in lines]
    total = sum((b - a) * (mean or 0) for a, b, mean in zip(counts, counts[1:], means, strict=False))
    assert last["episodes"] == counts[-1] > 100
    assert total / counts[-1] == pytest.approx(summary["env_steps"] / counts[-1], rel=0.05)
    assert first["session"] == 0

    again, _ = train(tmp_path, "total_env_steps=10000")
    assert again[: len(lines)] == lines
    assert {line["session"] for line in again[len(lines) :]} == {1}
    assert again[-1]["env_steps"] >= 10000 > again[-1]["trained_env_steps"]


def test_the_numbers_of_the_loss_stand_together() -> None:
    """Catches curves that go by the metrics' names: a report, a dashboard of a tracker or a callback no longer finds
    them, and those of a run that is resumed break off."""
    line = CatalogueReader().read(make_sources())
    terms = make_sources().statistics.terms
    assert {name: value for name, value in line.items() if name.startswith("loss/")} == {
        f"loss/{term}": value for term, value in terms.items()
    }
    assert {"weight_clipped_fraction/lstm", "weight_relative_distance_to_init/lstm"} <= line.keys()
    assert "entropy_nats" not in line


def test_a_counter_begins_at_zero() -> None:
    """Catches a curve that begins with its first event, so that a difference of lines misses it; and a line, or the
    charts of a tracker, that names each metric again because it might fail."""
    line = CatalogueReader().read(make_sources())
    assert (line["actor_restarts/died"], line["actor_restarts/oom"]) == (1, 0)
    assert (line["stage_seconds/actor_env"], line["stage_seconds/checkpoint"]) == (0.5, 0)
    assert [name for name in line if name.startswith("failed_readings/")] == ["failed_readings/shoal_broken"]
    assert line["sampled_env_steps"] == line["trained_env_steps"] + line["in_flight_env_steps"] + sum(
        steps for name, steps in line.items() if name.startswith("dropped_env_steps/")
    )


def test_half_a_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    """Catches a run killed while it wrote: its last line would take the first of the next session with it."""
    (tmp_path / "metrics.jsonl").write_text('{"env_steps": 5}\n{"env_st')
    MetricsHistory(Broken(), tmp_path, session=1, every_seconds=100.0).close()
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert whole[:2] == ['{"env_steps": 5}', '{"env_st']
    assert json.loads(whole[2])["session"] == 1


def test_a_reading_that_fails_costs_itself(tmp_path: Path) -> None:
    """Catches one broken metric that ends the history, and numbers that are no JSON."""
    history = MetricsHistory(Broken(), tmp_path, session=0, every_seconds=100.0)
    history.close()
    [line] = lines_of(tmp_path)
    assert (line["policy_version"], line["env_steps"], line["log_prob_error_max"]) == (7, 3, None)
    read = {"policy_version", "log_prob_error_max", "failed_readings/shoal_updates_total"}
    assert read < set(CatalogueReader().read(Broken()))
    assert "updates" not in line


class Tracker(Sink):
    """Keeps its lines; waits at each line until it may go on."""

    def __init__(self, *, fails: bool = False) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.may_go_on = threading.Event()
        self.closed = False
        self.fails = fails

    def write(self, line: Mapping[str, Any]) -> None:
        self.may_go_on.wait()
        if self.fails:
            raise ConnectionError("gone")
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


def test_a_slow_or_broken_tracker_costs_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a network that hangs and with it the history, or the end of the run; lines kept until memory is full; a
    connection that stays open after an error."""
    monkeypatch.setattr(sinks_module, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(sinks_module, "WAITING_LINES", 3)
    slow, broken = Tracker(), Tracker(fails=True)
    run = LoggedRun(directory=tmp_path, id="id", name="run", config={})
    sink, other = SinkThread("slow", slow, run), SinkThread("broken", broken, run)
    for n in range(10):
        sink.put({"env_steps": n})
    sink.close()
    assert "slow is too slow" in caplog.text
    assert "slow did not end in time" in caplog.text
    slow.may_go_on.set()
    wait_for(lambda: [line["env_steps"] for line in slow.lines][:3] == [0, 1, 2])
    wait_for(lambda: slow.closed)
    other.put({"env_steps": 0})
    broken.may_go_on.set()
    wait_for(lambda: "broken failed and gets no more" in caplog.text)
    for n in range(10):
        other.put({"env_steps": n})
    other.close()
    assert broken.closed
    assert "broken is too slow" not in caplog.text


def test_a_sink_that_fails_with_lines_waiting_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an end of the run that waits for room among the lines of a sink that takes no more."""
    monkeypatch.setattr(sinks_module, "CLOSE_SECONDS", 100_000.0)
    monkeypatch.setattr(sinks_module, "WAITING_LINES", 3)
    broken = Tracker(fails=True)
    sink = SinkThread("broken", broken, LoggedRun(directory=tmp_path, id="id", name="run", config={}))
    for n in range(10):
        sink.put({"env_steps": n})
    ending = threading.Thread(target=sink.close, daemon=True)
    ending.start()
    wait_for(lambda: sink._closed)
    ending.join(0.5)
    assert ending.is_alive()
    broken.may_go_on.set()
    wait_for(lambda: not ending.is_alive())
    assert broken.closed


def test_a_sink_that_is_interrupted_while_it_opens_is_closed_once_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a connection that stays open after Ctrl+C during a slow ``open``."""

    class Opens(Tracker):
        def open(self, run: LoggedRun) -> None:
            signal.pthread_kill(main, signal.SIGINT)
            self.may_go_on.wait()

    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    opens = Opens()
    try:
        with pytest.raises(KeyboardInterrupt):
            SinkThread("opens", opens, LoggedRun(directory=tmp_path, id="id", name="run", config={}))
    finally:
        signal.signal(signal.SIGINT, before)
    opens.may_go_on.set()
    wait_for(lambda: opens.closed)
    assert opens.lines == []


def test_each_sink_has_settings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tracker that changes the settings of the next, or of the run."""
    seen: list[dict[str, Any]] = []

    class Changes(Tracker):
        def open(self, run: LoggedRun) -> None:
            seen.append(json.loads(json.dumps(run.config)))
            run.config["env"]["id"] = "another"
            del run.config["seed"]  # type: ignore[attr-defined]  # a copy, which may change

    monkeypatch.setattr(sinks_module, "TRACKERS", dict.fromkeys(("wandb", "trackio"), ("json", Changes)))
    config = {"env": {"id": "recall"}, "seed": 0}
    named = LogConfig(sinks=[SinkConfig(name="wandb"), SinkConfig(name="trackio")])
    for sink in make_sinks(named, LoggedRun(directory=tmp_path, id="id", name="run", config=config)):
        sink.close()
    assert seen == [config] * 2 == [{"env": {"id": "recall"}, "seed": 0}] * 2


def test_what_is_not_installed_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run of a day that logs to nowhere, or ends with a traceback when its tracker is missing."""
    monkeypatch.setattr(sinks_module, "TRACKERS", {"wandb": ("no_such_package", sinks_module.WeightsAndBiases)})
    named = LogConfig(sinks=[SinkConfig(name="wandb")])
    [problem] = check_sinks(named)
    assert problem.startswith("log.sinks: wandb is not installed here; pip install 'shoal[wandb]'")
    monkeypatch.setattr(sinks_module, "TRACKERS", {"wandb": ("json", lambda: 1 / 0)})
    with pytest.raises(ValueError, match=r"log\.sinks: wandb cannot be started"):
        make_sinks(named, LoggedRun(directory=tmp_path, id="id", name="run", config={}))


def test_trackers_get_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches curves over the wrong axis, or that end early, and a call that a tracker's version does not have."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason=f"needs pip install 'shoal[{name}]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    lines, _ = train(tmp_path, "total_env_steps=5000", "log.sinks=[tensorboard, wandb, trackio]")
    wanted = [
        (line["env_steps"], line["loss/policy_loss"]) for line in lines if line.get("loss/policy_loss") is not None
    ]
    assert len(wanted) > 1

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/policy_loss")]
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted])

    [data] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert data.read_bytes().count(b"loss/policy_loss") >= len(wanted)

    [database] = (tmp_path / "trackio").glob("shoal.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    stored = [(step, json.loads(metrics)) for step, metrics in rows]
    found = [(step, metrics["loss/policy_loss"]) for step, metrics in stored if "loss/policy_loss" in metrics]
    assert found == wanted


def test_output_as_json(tmp_path: Path) -> None:
    """Catches a line on the screen or in the log that a machine cannot read."""
    # An environment that faults makes a warning.
    done = shoal(
        "train",
        *INLINE[1:],
        "env.id=service_envs:Scripted-v0",
        f'env.kwargs={{how: raises, at: 40, marker: "{tmp_path / "marker"}"}}',
        "total_env_steps=3000",
        "evaluation.random_seconds=0",  # it would meet the fault first
        "log.format=json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0]["event"] == "message"
    assert [line["event"] for line in told][-2:] == ["progress", "summary"]
    assert told[-1]["env_steps"] == told[-2]["env_steps"] == read_summary(tmp_path / "run")["env_steps"]
    warnings = [json.loads(line) for line in done.stderr.splitlines()]
    assert warnings
    logged = [json.loads(line) for line in (tmp_path / "run" / "run.log").read_text().splitlines()]
    assert {"time", "event", "level", "logger", "message"} <= logged[0].keys()
    assert [line["message"] for line in warnings] == [w["message"] for w in logged if w["level"] == "WARNING"]
