"""Jobs in processes of their own, which end with the process that started them and leave none behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar, cast

from shoal.deploy.placement.hardware import available_cores
from shoal.envs.main_module import without_main_module

T = TypeVar("T")

START_SECONDS = 5.0
"""Seconds that a new process takes before it begins its first job: it imports torch and the environment."""


class JobFailed(Exception):
    """A job raised, or the process that did it ended; the message says which."""


class JobProcess(Generic[T]):
    """A process that does one job after the other; it starts with the first.

    It leads a process group of its own: Ctrl-C in a terminal does not reach it, and whatever it starts ends with it.
    Threads may share one as long as only one of them submits jobs; any may ``kill``.
    """

    def __init__(self, *, silent: bool = False) -> None:
        """Prepare; ``silent`` throws away what jobs print."""
        self._silent = silent
        self._lock = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: connection.Connection | None = None
        self._killed = False

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        process = self._process
        return process.pid if process else None

    def fileno(self) -> int:
        """Readable once there is a result: for ``multiprocessing.connection.wait``."""
        assert self._connection is not None
        return self._connection.fileno()

    def submit(self, job: Callable[[], T]) -> None:
        """Hand over a job; ``result`` must follow.

        Raises:
            JobFailed: the process was killed or cannot be started.
        """
        try:
            self._start()
            assert self._connection is not None
            self._connection.send(job)
        except (OSError, EOFError) as error:
            raise self._ended(error) from error

    def poll(self, seconds: float) -> bool:
        """Wait at most ``seconds``; True if ``result`` will not block."""
        assert self._connection is not None
        try:
            return self._connection.poll(seconds)
        except (OSError, EOFError):
            return True

    def result(self) -> T:
        """The return value of the job.

        Raises:
            JobFailed: it raised, or the process ended.
        """
        assert self._connection is not None
        try:
            answer: _Answer = self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._ended(error) from error
        if answer.failure is not None:
            failed = JobFailed(answer.failure)
            failed.add_note(answer.trace)
            raise failed
        found: T = answer.value
        return found

    def end(self) -> None:
        """End the process and all that it started; the next job gets a new one."""
        with self._lock:
            self._end()

    def kill(self) -> None:
        """The same, now and for good."""
        with self._lock:
            self._killed = True
            self._end()

    def _start(self) -> None:
        with self._lock:
            if self._killed:
                raise JobFailed("it was ended")
            if self._process is not None:
                return
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, self._silent), daemon=False)
            # What it starts first would unblock signals again.
            resource_tracker.ensure_running()
            # Who catches an interrupt must know whom to end. The mask is for the child, which inherits it; here the
            # system would hand the signal to another thread, and Python would raise it in this one all the same.
            with _interrupts_later(), without_main_module():
                before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                try:
                    process.start()
                    self._process, self._connection = process, here
                finally:
                    there.close()
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _ended(self, error: BaseException) -> JobFailed:
        """Explain why the process did not answer; the next job gets a new one."""
        with self._lock:
            if self._killed or self._process is None:
                return JobFailed("it was ended")
            process = self._process
            self._end()
            code = process.exitcode
        if code is not None and code < 0:
            return JobFailed(f"its process {process.pid} was killed by signal {signal.Signals(-code).name}")
        return JobFailed(f"its process {process.pid} exited with code {code} ({type(error).__name__})")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.pid is not None
        # Before anything waits for it: its number is its own for so long, also that of its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        if self._connection is not None and not self._killed:
            self._connection.close()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """An interrupt that comes inside the block is handled at its end. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


def run_jobs(jobs: Sequence[Callable[[], T]], processes: int | None) -> list[T]:
    """Run independent jobs and return their values, in order.

    Args:
        jobs: independent of each other; they cross to other processes.
        processes: how many do them; 1 is this one. None takes as many of this machine's cores as pay, going by how long
            the first job takes.

    Raises:
        JobFailed: a job in another process raised, or the process ended.
        Exception: what a job in this process raised.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    done: list[T] = []
    if processes is None and jobs:
        began = time.monotonic()
        done.append(jobs[0]())
        processes = _how_many_pay(len(jobs) - 1, time.monotonic() - began, available_cores())
    rest = jobs[len(done) :]
    number = min(processes or 1, len(rest))
    if number <= 1:
        return [*done, *(job() for job in rest)]
    results = dict(_results(rest, number))
    return [*done, *(results[index] for index in range(len(rest)))]


def _how_many_pay(jobs: int, seconds: float, cores: int) -> int:
    """Processes that do ``jobs`` of ``seconds`` each soonest; 1 is this one, which need not be started."""

    def takes(number: int) -> float:
        return -(-jobs // number) * seconds + (START_SECONDS if number > 1 else 0.0)

    return min(range(1, max(1, cores) + 1), key=takes)


def _results(jobs: Sequence[Callable[[], T]], number: int) -> Iterator[tuple[int, T]]:
    todo = deque(enumerate(jobs))
    workers: list[JobProcess[T]] = [JobProcess() for _ in range(number)]
    doing: dict[JobProcess[T], int] = {}
    try:
        for worker in workers:
            doing[worker], job = todo.popleft()
            worker.submit(job)
        while doing:
            waiting: list[Any] = list(doing)  # anything that has a fileno
            for ready in connection.wait(waiting):
                worker = cast("JobProcess[T]", ready)
                index = doing.pop(worker)
                yield index, worker.result()
                if todo:
                    doing[worker], job = todo.popleft()
                    worker.submit(job)
    finally:
        for worker in workers:
            worker.kill()


class _Answer(NamedTuple):
    value: Any = None
    failure: str | None = None
    trace: str = ""


def _serve(jobs: connection.Connection, silent: bool) -> None:
    """The process: jobs until the other side is gone."""
    os.setpgrp()
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    if silent:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    while True:
        try:
            data = jobs.recv_bytes()
        except EOFError:
            return
        try:
            # What the job is made of is imported here, and may fail as the job itself may.
            answer = _Answer(value=ForkingPickler.loads(data)())
        except Exception as error:  # noqa: BLE001  (whatever a job raises is returned to its caller)
            answer = _Answer(failure=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
        jobs.send(answer)


def _end_with_parent() -> None:
    """End this process and all it started when its parent has died without a word."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
