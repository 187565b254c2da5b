"""A run inside a program that goes on afterwards: what is set for the whole process is restored at its end."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from shoal.deploy.records.warnings_handler import WarningsHandler

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Run the block with torch's defaults, and then restore what the process had.

    This is: the random streams of Python, numpy and torch; torch's default dtype and device, number of threads,
    autocast and gradient modes; the filters of warnings; signal handlers; the environment variables; and the current
    directory.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002  (environments use the old stream)
        stack.enter_context(torch_defaults())
        stack.callback(_restore_variables, dict(os.environ))
        stack.callback(os.chdir, os.getcwd())
        stack.callback(_restore_handlers, {number: signal.getsignal(number) for number in _SIGNALS})
        yield


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Run the block with torch's default dtype and device, without autocast, and with gradients; then restore what the
    process had, its random streams and number of threads, too."""
    with contextlib.ExitStack() as stack:
        accelerators = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices=accelerators))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if (device := torch.get_default_device()).type != "cpu":
            stack.callback(torch.set_default_device, device)
            torch.set_default_device("cpu")
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _restore_handlers(before: dict[signal.Signals, Any]) -> None:
    """Ray sets handlers, too."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if handler is not None:  # None: one that was not set from Python
                signal.signal(number, handler)


def _restore_variables(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show shoal's warnings on standard error in the block, where the program has set up no logging of its own."""
    if logging.getLogger().handlers:
        yield
        return
    ours, handler = logging.getLogger("shoal"), WarningsHandler()
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def deliver(number: int) -> None:
    """Give the caller a signal that ended a run, now that its own handlers are back.

    Raises:
        KeyboardInterrupt: a SIGINT, whatever the caller's handler does.
    """
    signal.raise_signal(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
