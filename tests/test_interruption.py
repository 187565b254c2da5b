"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from shoal.deploy.training.interruption import interruption


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
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


def test_nohup_is_respected():
    """A run under nohup that ends with its terminal all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption(0) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert not asked.requested.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)
