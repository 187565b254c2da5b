"""Jobs in processes of their own: what becomes of them when they fail, and of the processes when nobody wants them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
from jobs import end_itself, is_null, own_pid, raise_error, square, with_a_child
from service import alive, descendants, wait_for
from shoal.deploy.evaluation.job_process import JobFailed, JobProcess, _how_many_pay, run_jobs


def test_results_come_in_the_order_of_the_jobs() -> None:
    """Catches results in the order in which processes finish, and jobs that all run in this process."""
    jobs = [functools.partial(square, number) for number in range(7)]
    assert run_jobs(jobs, 1) == run_jobs(jobs, 3) == run_jobs(jobs, None) == [number**2 for number in range(7)]
    others = set(run_jobs([own_pid] * 6, 2))
    assert os.getpid() not in others
    assert len(others) <= 2
    assert set(run_jobs([own_pid] * 3, 1)) == {os.getpid()}
    assert run_jobs([], None) == []
    with pytest.raises(ValueError, match="at least 1"):
        run_jobs(jobs, 0)
    assert not any(map(alive, others))


def test_processes_are_started_where_they_pay() -> None:
    """Catches processes for jobs that are over before the processes have started, and one for hours of work."""
    assert _how_many_pay(100, 0.01, 8) == 1
    assert _how_many_pay(100, 10.0, 8) == 8
    assert _how_many_pay(3, 60.0, 8) == 3
    assert _how_many_pay(0, 60.0, 8) == 1
    assert _how_many_pay(100, 60.0, 1) == 1


def test_a_job_that_fails_says_how_and_the_next_one_is_done() -> None:
    """Catches an error without its text, a process that is not replaced, and a wait for one that is gone."""
    process: JobProcess[int] = JobProcess()
    try:
        process.submit(functools.partial(raise_error, "not there"))
        with pytest.raises(JobFailed, match="LookupError: not there") as raised:
            process.result()
        assert "in raise_error" in raised.value.__notes__[0]
        first = process.pid
        process.submit(functools.partial(square, 3))
        assert process.result() == 9
        assert process.pid == first
        process.submit(functools.partial(end_itself, 7))
        with pytest.raises(JobFailed, match=f"process {first} exited with code 7"):
            process.result()
        process.submit(own_pid)
        second = process.result()
        assert second != first
        process.submit(functools.partial(time.sleep, 3600))
        os.kill(second, signal.SIGKILL)
        with pytest.raises(JobFailed, match="killed by signal SIGKILL"):
            process.result()
        process.submit(functools.partial(time.sleep, 3600))
        process.end()
        process.submit(functools.partial(square, 4))
        assert process.result() == 16
    finally:
        process.kill()
    with pytest.raises(JobFailed, match="was ended"):
        process.submit(own_pid)
    with pytest.raises(JobFailed, match="LookupError"):
        run_jobs([functools.partial(raise_error, "x")] * 3, 2)


def test_a_silent_process_prints_nowhere() -> None:
    """Catches an evaluation that prints over the live view."""
    process: JobProcess[int] = JobProcess(silent=True)
    try:
        for stream in (1, 2):
            process.submit(functools.partial(is_null, stream))
            assert process.result()
    finally:
        process.kill()


def test_ending_a_process_ends_what_it_started(tmp_path: Path) -> None:
    """Catches environments in processes of their own that go on for ever."""
    process: JobProcess[int] = JobProcess()
    marker = tmp_path / "pid"
    process.submit(functools.partial(with_a_child, str(marker)))
    wait_for(lambda: marker.exists() and marker.read_text())
    own, child = process.pid, int(marker.read_text())
    assert own is not None
    assert alive(own)
    assert alive(child)
    process.kill()
    wait_for(lambda: not alive(own) and not alive(child), seconds=200)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Catches processes that outlive a parent which was killed and could say nothing."""
    marker = tmp_path / "pid"
    code = (
        "import functools, jobs\n"
        "from shoal.deploy.evaluation.job_process import JobProcess\n"
        "process = JobProcess()\n"
        f"process.submit(functools.partial(jobs.with_a_child, {str(marker)!r}))\n"
        "process.result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(lambda: marker.exists() and marker.read_text())
    below = set(descendants(parent.pid))
    assert int(marker.read_text()) in below
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, below)), seconds=200)


def test_an_interrupt_in_the_middle_of_a_start_knows_whom_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an interrupt that another thread takes while this one blocks it: Python raises it here all the same, and
    a process that nobody knows yet is waited for at the exit, for ever."""
    start = SpawnProcess.start

    def interrupted(process: SpawnProcess) -> None:
        start(process)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # where Python would raise it

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    process: JobProcess[int] = JobProcess()
    try:
        with pytest.raises(KeyboardInterrupt):
            process.submit(own_pid)
        child = process.pid
        assert child is not None
        process.kill()
        assert not alive(child)
    finally:
        over.set()
        thread.join()
