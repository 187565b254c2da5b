"""Trackers that also get every line of ``RUN/metrics.jsonl``: TensorBoard, Weights & Biases, trackio.

Each is an extra of its own, and works on a thread of its own: one that is slow or fails costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shoal.deploy.settings.sections import LogConfig

log = logging.getLogger(__name__)

WAITING_LINES = 100
CLOSE_SECONDS = 30.0
"""What a tracker may take at the end to send what it has."""


class Tracker(Protocol):
    """What a tracker does with the lines of one run."""

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """One line of the history."""

    def close(self) -> None:
        """No more will come."""


class Sink:
    """A tracker on a thread of its own. A line it has no time for is left out; at an error it is given up."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._lines: queue.Queue[Mapping[str, float | int | None] | None] = queue.Queue(WAITING_LINES)
        self._late = False
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, float | int | None]) -> None:
        """Hand over a line; returns at once."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            if not self._late and self._thread.is_alive():
                self._late = True
                log.warning("log.sinks: %s is too slow, lines are left out; metrics.jsonl has them all", self._name)

    def close(self) -> None:
        """Send what is waiting, for at most ``CLOSE_SECONDS``."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.warning("log.sinks: %s did not end in time; metrics.jsonl has everything", self._name)

    def _work(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._tracker.write(line)
            self._tracker.close()
        except Exception as error:  # noqa: BLE001  (other people's code, and a network)
            log.warning(
                "log.sinks: %s failed and gets no more lines; metrics.jsonl has them all: %r", self._name, error
            )


class TensorBoard:
    """Event files in ``RUN/tensorboard``, by environment steps: ``tensorboard --logdir runs``."""

    def __init__(self, settings: LogConfig, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Every number, at its environment step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        # All in one event: torch's SummaryWriter makes one of each, which takes nine times as long, with the lock that
        # the training loop needs, too.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(line).items()]
        self._writer.add_event(Event(wall_time=line["time"], step=line["env_steps"], summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; one that is resumed here is resumed there. ``WANDB_MODE=offline`` needs no network."""

    def __init__(self, settings: LogConfig, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            name=settings.name or run_dir.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Every number."""
        self._run.log(_numbers(line) | {"env_steps": line["env_steps"]})

    def close(self) -> None:
        """Send what is buffered."""
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine unless its own settings say otherwise: ``trackio show``."""

    def __init__(self, settings: LogConfig, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> None:
        import trackio

        # It tells how to look at it; what is on standard output may be read by a machine.
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=settings.project,
                name=f"{settings.name or run_dir.name}-{run_id[:8]}",
                config=dict(config),
                resume="allow",
            )

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Every number, at its environment step."""
        self._run.log(_numbers(line), step=int(line["env_steps"] or 0))

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()


TRACKERS: Mapping[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
}
"""By the name in ``log.sinks``, which is also the extra's: the package it needs, and what writes to it."""


def missing(settings: LogConfig) -> list[str]:
    """Sinks whose package is not installed, as problems of the settings."""
    return [
        f"log.sinks: {name} is not installed here; pip install 'shoal[{name}]' (in a checkout: pip install -e "
        f"'.[{name}]'), or leave it out"
        for name in settings.sinks
        if importlib.util.find_spec(TRACKERS[name][0]) is None
    ]


def make_sinks(settings: LogConfig, run_dir: Path, run_id: str, config: Mapping[str, Any]) -> list[Sink]:
    """Those that ``log.sinks`` names.

    Raises:
        ValueError: one of them cannot be started: no network, no key.
    """
    sinks: list[Sink] = []
    for name in settings.sinks:
        try:
            sinks.append(Sink(name, TRACKERS[name][1](settings, run_dir, run_id, config)))
        except Exception as error:
            for sink in sinks:
                sink.close()
            raise ValueError(f"log.sinks: {name} cannot be started: {type(error).__name__}: {error}") from error
    return sinks


def _numbers(line: Mapping[str, float | int | None]) -> dict[str, float]:
    heads = ("time", "session", "env_steps")
    return {name: value for name, value in line.items() if value is not None and name not in heads}
