"""Signals that ask a run to end."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time

import pytest
from shoal.deploy.training.interruption import interruption


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGXCPU])
def test_the_first_signal_asks_the_run_to_save_and_end(number, capsys):
    """A closed terminal that ends a run at once, with nothing saved."""
    before = signal.getsignal(number)
    with interruption(0) as asked:
        signal.raise_signal(number)  # to this thread, which waits
        assert asked.requested.wait(10)
        assert asked.signal_number == number
    assert signal.getsignal(number) is before
    assert "stopping: an update under way is finished" in capsys.readouterr().err


def test_a_terminal_that_is_gone_takes_no_message(monkeypatch):
    """A handler that fails because its message cannot be written: the run ends instead of saving."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with interruption(0) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.requested.wait(10)
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_process_that_an_environment_forks_can_be_ended():
    """Catches a child that takes the run's SIGTERM for its own: its environment, and the run's end, waited for it."""
    with interruption(0) as asked:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # which is still the run's here
        assert asked.requested.wait(10)


def test_nohup_is_respected():
    """A run under nohup that ends with its terminal all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption(0) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.requested.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_what_comes_more_than_once_by_itself_ends_nothing_at_once(number):
    """A run that is ended unsaved by the next second of processor time, or by the SIGTERM that follows a warning."""
    with interruption(0, owns_process=False) as asked:
        signal.raise_signal(number)
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert asked.signal_number == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGXCPU])
def test_a_programs_own_use_of_a_signal_is_left_to_it(number):
    """A program that asks itself for something by a signal, and a run that ends by it."""
    came = []
    before = signal.signal(number, lambda *_: came.append(number))
    try:
        with interruption(0) as asked:
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert came == [number]
    assert not asked.requested.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells of handlers in C")
def test_a_handler_in_c_is_left_alone(tmp_path):
    """A run that takes the signal by which a program prints where it hangs."""
    with (tmp_path / "traces.txt").open("w+") as traces:
        faulthandler.register(signal.SIGUSR1, file=traces)
        try:
            with interruption(0) as asked:
                signal.raise_signal(signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
        traces.seek(0)
        assert "test_a_handler_in_c_is_left_alone" in traces.read()
    assert not asked.requested.is_set()
