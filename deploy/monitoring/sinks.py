"""Trackers that also get every line of ``RUN/metrics.jsonl``: TensorBoard, Weights & Biases, trackio.

Each is an optional dependency and works on a thread of its own: one that is slow or fails does not affect the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
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
"""A tracker has this long at the end to send its remaining lines."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tracked:
    """What a tracker is told of the run whose lines it gets, or of one of several policies of a run."""

    directory: Path
    """For the files of the tracker."""
    id: str
    """The same in every session of a resumed run."""
    name: str
    config: Mapping[str, Any]
    policy: str = ""
    """Of several policies, each of which is a run of its own there, beside the others; else empty."""


class Tracker(Protocol):
    """Writes the lines of one run to a tracking service."""

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Write one line of metrics.jsonl."""

    def close(self) -> None:
        """Finish: no more lines will come."""


class Sink:
    """Runs a tracker on a thread of its own; leaves out lines while it is behind, and stops at its first error."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._lines: queue.Queue[Mapping[str, float | int | None] | None] = queue.Queue(WAITING_LINES)
        self._late = self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, float | int | None]) -> None:
        """Queue a line; never blocks."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            if not self._late and self._thread.is_alive():
                self._late = True
                log.warning("log.sinks: %s is too slow, lines are left out; metrics.jsonl has them all", self._name)

    def close(self) -> None:
        """Send the queued lines, for at most ``CLOSE_SECONDS``; once."""
        closed, self._closed = self._closed, True
        if not closed and self._thread.is_alive():
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

    def __init__(self, settings: LogConfig, tracked: Tracked) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(tracked.directory / "tensorboard"))

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Write all numbers at their environment step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all values: torch's SummaryWriter makes one event each, which holds the GIL nine times as long.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(line).items()]
        self._writer.add_event(Event(wall_time=line["time"], step=line["env_steps"], summary=Summary(value=values)))

    def close(self) -> None:
        """Write buffered events."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; one that is resumed here is resumed there. ``WANDB_MODE=offline`` needs no network."""

    def __init__(self, settings: LogConfig, tracked: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            name=tracked.name,
            id=tracked.id,
            resume="allow",
            dir=str(tracked.directory),
            config=dict(tracked.config),
            # Else the second policy would get the run of the first. One that is alone is wandb.run, for callbacks.
            reinit="create_new" if tracked.policy else None,
        )
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Write all numbers."""
        self._run.log(_numbers(line) | {"env_steps": line["env_steps"]})

    def close(self) -> None:
        """Send buffered lines."""
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine unless its own settings say otherwise: ``trackio show``."""

    def __init__(self, settings: LogConfig, tracked: Tracked) -> None:
        import trackio

        # trackio prints instructions; standard output is for machines.
        with contextlib.redirect_stdout(sys.stderr):
            # It ends the run that is under way in its context, which would be that of the policy before.
            self._run = contextvars.Context().run(
                trackio.init,
                project=settings.project,
                name=f"{tracked.name}-{tracked.id[:8]}",
                config=dict(tracked.config),
                resume="allow",
            )

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Write all numbers at their environment step."""
        self._run.log(_numbers(line), step=int(line["env_steps"] or 0))

    def close(self) -> None:
        """Write buffered lines."""
        self._run.finish()


TRACKERS: Mapping[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
}
"""The required package and the class of each tracker, by its name in ``log.sinks`` and in the extras."""


def missing(settings: LogConfig) -> list[str]:
    """Return a problem for each sink whose package is not installed."""
    return [
        f"log.sinks: {name} is not installed here; pip install 'shoal[{name}]' (in a checkout: pip install -e "
        f"'.[{name}]'), or leave it out"
        for name in settings.sinks
        if importlib.util.find_spec(TRACKERS[name][0]) is None
    ]


def make_sinks(settings: LogConfig, tracked: Tracked) -> list[Sink]:
    """Start the sinks that ``log.sinks`` names.

    Raises:
        ValueError: a tracker cannot be started, for example without network or key.
    """
    sinks: list[Sink] = []
    for name in settings.sinks:
        try:
            sinks.append(Sink(name, TRACKERS[name][1](settings, tracked)))
        except Exception as error:
            for sink in sinks:
                sink.close()
            raise ValueError(f"log.sinks: {name} cannot be started: {type(error).__name__}: {error}") from error
    return sinks


def _numbers(line: Mapping[str, float | int | None]) -> dict[str, float]:
    heads = ("time", "session", "env_steps")
    return {name: value for name, value in line.items() if value is not None and name not in heads}
