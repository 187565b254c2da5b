"""Sinks, which get every line of ``RUN/metrics.jsonl``: TensorBoard, Weights & Biases, trackio, one's own.

Each works on a thread of its own: one that is slow or fails does not affect the others.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import dataclasses
import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal import given
from shoal.deploy.settings import named_code
from shoal.deploy.settings.sections import TENSORBOARD, TRACKIO, WANDB, LogConfig, SinkConfig
from shoal.envs.raised import raised
from shoal.problems import Problems

log = logging.getLogger(__name__)

WAITING_LINES = 100
CLOSE_SECONDS = 30.0
"""A sink has this long at the end to write its remaining lines."""

Line = Mapping[str, float | int | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRun:
    """What a sink is told of the run whose lines it gets, or of one of several policies of a run."""

    directory: Path
    """For the sink's files: that of the run, or of the policy in it; absolute."""
    id: str
    """The same in every session of a resumed run."""
    name: str
    """``log.name``, or the name of the run directory; with that of the policy, of several."""
    config: Mapping[str, Any]
    """The settings as plain data, as RUN/config.yaml has them; a copy for each sink. W&B and trackio store them."""
    policy: str = ""
    """Of several policies, each of which has sinks of its own; else empty."""
    project: str = ""
    """``log.project``."""


class Sink(abc.ABC):
    """Gets every line of RUN/metrics.jsonl; a subclass is named in ``log.sinks``, and defines ``write`` at least.

    Sinks are made in the process that trains, in every mode; of several policies each has its own. The constructor gets
    the arguments of the settings (``{name: my_module:MySink, kwargs: {...}}``). It keeps them and opens nothing: the
    check before a run makes a sink as well, and drops it.

    The methods are called one after the other in a thread that is the sink's alone. Training waits for ``open``, and
    then for nothing: up to 100 lines wait for a sink that is slow, others are left out, which a warning says once. An
    exception of ``write`` is a warning, too; the sink gets no more lines, and is closed. metrics.jsonl has all lines
    in any case.
    """

    def open(self, run: LoggedRun) -> None:
        """Open files and connections, before anything is started for the run; an exception refuses the run.

        A resumed run opens its sinks again, with the same ``run.id``.
        """
        return None

    @abc.abstractmethod
    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Write one line: the numbers by name, None where one was not finite or not measured.

        ``time`` is in Unix seconds, ``seconds`` in seconds of training in this session, ``env_steps`` in trained
        environment steps of the whole run; ``session`` and ``policy_version`` count from 0. A line comes every
        ``log.every_seconds``, and one at the end, with the final values. It is a copy, which the sink may change.
        """

    def close(self) -> None:
        """Finish: no more lines will come. Called once after ``open``, also after an exception of ``write``; not after
        one of ``open``.

        The end of a run waits up to 30 s for it and the lines before it. It is not called where the process is killed.
        """
        return None


_METHODS: Mapping[str, tuple[str, ...]] = {"open": ("run",), "write": ("line",), "close": ()}
"""With the arguments that they are called with."""


class SinkThread:
    """The thread of a sink; leaves out lines while it is behind, and ends at its first error.

    Raises:
        Exception: whatever ``open`` raised.
    """

    def __init__(self, name: str, sink: Sink, run: LoggedRun) -> None:
        self._name, self._sink, self._run = name, sink, run
        self._lines = collections.deque[Line]()
        self._changed = threading.Condition()
        self._late = self._failed = self._closed = False
        self._opened = concurrent.futures.Future[None]()
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)
        try:
            self._thread.start()
            self._opened.result()
        except BaseException:
            # Ctrl+C while it is opened: it may yet be open, and is closed then.
            self._end()
            raise

    def put(self, line: Line) -> None:
        """Queue a copy of a line; never blocks."""
        if self._failed:
            return
        with self._changed:
            full = len(self._lines) >= WAITING_LINES
            if not full:
                self._lines.append(dict(line))
                self._changed.notify()
        if full and not self._late:
            self._late = True
            log.warning("log.sinks: %s is too slow, lines are left out; metrics.jsonl has them all", self._name)

    def close(self) -> None:
        """Write the queued lines and close the sink, for at most ``CLOSE_SECONDS``; once."""
        if self._closed:
            return
        self._end()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("log.sinks: %s did not end in time; metrics.jsonl has everything", self._name)

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _next(self) -> Line | None:
        """The next line, once there is one; None once no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            return self._lines.popleft() if self._lines else None

    def _work(self) -> None:
        # Other people's code, and a network. SystemExit would end this thread without a word.
        try:
            self._sink.open(self._run)
        except BaseException as error:  # noqa: BLE001  (as said above)
            self._opened.set_exception(error if isinstance(error, Exception) else RuntimeError(raised(error)))
            return
        self._opened.set_result(None)
        try:
            while (line := self._next()) is not None:
                self._sink.write(line)
        except BaseException as error:  # noqa: BLE001  (as said above)
            self._failed = True
            log.warning(
                "log.sinks: %s failed and gets no more lines; metrics.jsonl has them all: %s", self._name, raised(error)
            )
        try:
            self._sink.close()
        except BaseException as error:  # noqa: BLE001  (as said above)
            if not self._failed:
                log.warning(
                    "log.sinks: %s failed when it was closed, and may lack lines; metrics.jsonl has them all: %s",
                    self._name,
                    raised(error),
                )


class TensorBoard(Sink):
    """Event files in ``RUN/tensorboard``, by environment steps: ``tensorboard --logdir runs``."""

    def open(self, run: LoggedRun) -> None:
        """Make the folder and its file."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.directory / "tensorboard"))

    def write(self, line: Line) -> None:
        """Write all numbers at their environment step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        # One event for all values: torch's SummaryWriter makes one event each, which holds the GIL nine times as long.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(line).items()]
        self._writer.add_event(Event(wall_time=line["time"], step=line["env_steps"], summary=Summary(value=values)))

    def close(self) -> None:
        """Write buffered events."""
        self._writer.close()


class WeightsAndBiases(Sink):
    """A run of Weights & Biases; one that is resumed here is resumed there. ``WANDB_MODE=offline`` needs no network."""

    def open(self, run: LoggedRun) -> None:
        """Begin or resume the run there."""
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            # Else the second policy would get the run of the first. One that is alone is wandb.run, for callbacks.
            reinit="create_new" if run.policy else None,
        )
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")

    def write(self, line: Line) -> None:
        """Write all numbers."""
        self._run.log(_numbers(line) | {"env_steps": line["env_steps"]})

    def close(self) -> None:
        """Send buffered lines."""
        self._run.finish()


class Trackio(Sink):
    """A run of trackio, on this machine unless its own settings say otherwise: ``trackio show``."""

    def open(self, run: LoggedRun) -> None:
        """Begin or resume the run there."""
        import trackio

        # trackio prints instructions; standard output is for machines.
        with contextlib.redirect_stdout(sys.stderr):
            # It ends the run that is under way in its context, which would be that of the policy before.
            self._run = contextvars.Context().run(
                trackio.init,
                project=run.project,
                name=f"{run.name}-{run.id[:8]}",
                config=dict(run.config),
                resume="allow",
            )

    def write(self, line: Line) -> None:
        """Write all numbers at their environment step."""
        self._run.log(_numbers(line), step=int(line["env_steps"] or 0))

    def close(self) -> None:
        """Write buffered lines."""
        self._run.finish()


TRACKERS: Mapping[str, tuple[str, type[Sink]]] = {
    TENSORBOARD: ("tensorboard", TensorBoard),
    WANDB: ("wandb", WeightsAndBiases),
    TRACKIO: ("trackio", Trackio),
}
"""The required package and the class of each tracker, by its name in ``log.sinks`` and in the extras."""


def check_sinks(settings: LogConfig) -> list[str]:
    """The problems of the sinks that ``log.sinks`` names, found by making those of the user's, and opening none."""
    problems = []
    for config in settings.sinks:
        try:
            _check(config)
        except ValueError as error:
            problems.append(f"log.sinks: {error}")
    return list(dict.fromkeys(problems))


def make_sinks(settings: LogConfig, run: LoggedRun) -> list[SinkThread]:
    """Start the sinks that ``log.sinks`` names.

    Raises:
        Problems: one for each that cannot be started, for example without network or key.
    """
    problems: list[str] = []
    with contextlib.ExitStack() as opened:
        sinks: list[SinkThread] = []
        for config in settings.sinks:
            try:
                own = dataclasses.replace(run, config=copy.deepcopy(dict(run.config)))
                sinks.append(SinkThread(config.name, _make(config), own))
            except (Exception, SystemExit) as error:  # noqa: BLE001  (as above)
                problems.append(f"log.sinks: {config.name} cannot be started: {raised(error)}")
            else:
                opened.callback(sinks[-1].close)
        if problems:
            raise Problems(*problems)
        opened.pop_all()
    return sinks


def _check(config: SinkConfig) -> None:
    """Raises ValueError: what is wrong with a sink."""
    name = config.name
    if name in TRACKERS:
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise ValueError(
                f"{name} is not installed here; pip install 'shoal[{name}]' (in a checkout: pip install -e "
                f"'.[{name}]'), or leave it out"
            )
        return
    try:
        found = named_code.find(name, given.sinks, "class")
        if not isinstance(found, type) or not issubclass(found, Sink):
            raise ValueError(f"expected a subclass of shoal.Sink, got {found!r}")
        if found.__abstractmethods__:
            raise ValueError(f"is a shoal.Sink that does not define {', '.join(sorted(found.__abstractmethods__))}")
        named_code.check_arguments(found, config.kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        made = found(**config.kwargs)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be made with the kwargs {config.kwargs}: {raised(error)}") from error
    for method, arguments in _METHODS.items():
        call = getattr(made, method)
        try:
            named_code.check_call(call, *arguments)
        except TypeError as error:
            raise ValueError(f"{name}: {method} must take ({', '.join(arguments)}): {error}") from error
        if inspect.iscoroutinefunction(call):
            raise ValueError(f"{name}: {method} is a coroutine function, which nothing awaits; define it without async")


def _make(config: SinkConfig) -> Sink:
    if config.name in TRACKERS:
        return TRACKERS[config.name][1]()
    made: Sink = named_code.find(config.name, given.sinks, "class")(**config.kwargs)
    return made


def _numbers(line: Line) -> dict[str, float]:
    heads = ("time", "session", "env_steps")
    return {name: value for name, value in line.items() if value is not None and name not in heads}
