"""Keeps what belongs to the whole process apart: an environment finds the settings that it left, everybody else theirs.

Other people's code changes torch's default type, the working directory or signal handlers, and prints. Adapters that
run it in their own process do so inside ``Surroundings``, once per step of all slots.
"""

from __future__ import annotations

# Its answers are compared at every step; ``signal`` makes an enumeration's member of each.
import _signal  # type: ignore[import-not-found]
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
import weakref
from collections import deque
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from shoal.envs.reports import Remark, Reports

SHOWN_LINES = 3
"""Lines that an environment prints which are shown; the rest is counted."""
PRINTED: Remark = "printed"
CHANGED: Remark = "process_setting"
"""Remarks: it printed a line; it changed a setting of the process."""


class _Settings(NamedTuple):
    """Settings of the process; torch's are None where torch is not imported."""

    default_dtype: Any
    gradients: bool | None
    torch_threads: int | None
    device: str | None
    determinism: int | None
    numpy_errors: dict[str, Any]
    directory: str | None
    warning_filters: list[Any]
    interrupt: Any
    terminate: Any
    hang_up: Any
    broken_pipe: Any
    umask: int
    socket_timeout: float | None
    logging_disabled: int
    root_level: int
    root_handlers: list[tuple[logging.Handler, int]]
    """Of the root logger, each with its level."""
    own_loggers: tuple[bool, int]
    """Of the logger ``shoal``: whether it is disabled, and its level. What is done to all loggers is done to it."""


_WORDS = {
    "default_dtype": "torch's default type",
    "gradients": "whether torch records gradients",
    "torch_threads": "torch's number of threads",
    "device": "torch's default device",
    "determinism": "whether torch keeps to deterministic algorithms",
    "numpy_errors": "what numpy does with floating-point errors",
    "directory": "the working directory",
    "interrupt": "what SIGINT does",
    "terminate": "what SIGTERM does",
    "hang_up": "what SIGHUP does",
    "broken_pipe": "what SIGPIPE does",
    "umask": "the permissions that new files lack (umask)",
    "socket_timeout": "the default timeout of sockets",
    "logging_disabled": "the level up to which nothing is logged (logging.disable)",
    "own_loggers": "what shoal's own loggers write",
}
"""Settings whose change is worth a remark: libraries change the filters of warnings and the root logger as a matter of
course."""
_HANDLERS = ("interrupt", "terminate", "hang_up", "broken_pipe")
_UNDONE = ("own_loggers",)
"""Settings that no environment has a use for: they are as before inside, too, where other threads of shoal log."""


class Surroundings:
    """A context for code of an environment, entered by one thread at a time. What it changes is its own: it is there
    again at the next entry, and elsewhere everything is as before."""

    def __init__(self, env_id: str, reports: Reports | None = None) -> None:
        """Prepare; ``reports`` takes a remark for each setting that is changed and each line that is printed."""
        self._env_id = env_id
        self.reports = Reports() if reports is None else reports
        self._own: dict[str, Any] = {}
        """The environment's settings, where they differ."""
        self._outside = self._begun = _settings()
        self._lines, self._unfinished = 0, ""
        self._told: set[str] = set()

    def __enter__(self) -> None:
        with _switching:
            if is_abandoned():
                return
            self._outside = self._begun = _settings()
            if self._own:
                self._begun = self._outside._replace(**self._own)
                _apply(self._begun, self._outside)
            if not isinstance(sys.stdout, _Output):
                sys.stdout = _output_before(sys.stdout)
            _inside.surroundings = self
            _entered[threading.current_thread()] = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _inside.surroundings = None
        with _switching:
            if _entered.pop(threading.current_thread(), None):
                self._leave()

    def _leave(self) -> None:
        if isinstance(sys.stdout, _Output):
            sys.stdout = sys.stdout.real
        left = _settings()
        if self._begun.default_dtype is None and left.default_dtype is not None:
            # Imported just now: what others will expect is what torch begins with.
            torch: Any = sys.modules["torch"]
            fresh: dict[str, Any] = {"default_dtype": torch.float32, "gradients": True, "determinism": 0}
            if hasattr(torch, "get_default_device"):
                fresh["device"] = "cpu"
            self._outside = self._outside._replace(torch_threads=left.torch_threads, **fresh)
            self._begun = self._begun._replace(torch_threads=left.torch_threads, **fresh)
        if left != self._begun:
            self._keep(left)
        if left != self._outside:
            _apply(self._outside, left)

    def _keep(self, left: _Settings) -> None:
        for name, before, now, outside in zip(_Settings._fields, self._begun, left, self._outside, strict=True):
            if now == before:
                continue
            if name not in _UNDONE:
                self._own[name] = now
            if now == outside:
                self._own.pop(name, None)
            elif name in _WORDS and name not in self._told:
                self._told.add(name)
                old, new = _in_words(name, before), _in_words(name, now)
                then = "that is undone" if name in _UNDONE else "that is kept for it alone"
                self.reports.remark(CHANGED, 1, f"{self._env_id} changes {_WORDS[name]} from {old} to {new}; {then}")

    def print(self, text: str) -> None:
        """Take what the environment prints: the first lines are shown, on standard error, and all are counted."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            if not line.strip():
                continue
            self._lines += 1
            if self._lines <= SHOWN_LINES:
                more = "; what it prints from here on is not shown" if self._lines == SHOWN_LINES else ""
                # Nobody may read it any more (| head), which is no fault of the environment.
                with contextlib.suppress(OSError, ValueError):
                    print(f"{self._env_id} prints: {line[:200]}{more}", file=sys.stderr)
            self.reports.remark(PRINTED, 1, f"{self._env_id} prints: {line[:200]}")


_switching = threading.Lock()
"""Held while settings change hands."""
_entered: dict[threading.Thread, Surroundings] = {}
"""Those that a thread is in."""
_abandoned: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class Abandoned(BaseException):
    """Nobody waits any more for what this thread does: it makes no more environments and closes those that it has."""


def abandon(thread: threading.Thread) -> None:
    """Take the process' settings back from a thread that does not return from an environment's code.

    From now on it changes no setting of the process, and ``raise_if_abandoned`` raises in it.
    """
    with _switching:
        _abandoned.add(thread)
        if inside := _entered.pop(thread, None):
            # Whether gradients are recorded is each thread's own.
            inside._outside = inside._outside._replace(gradients=None)
            inside._leave()


def is_abandoned() -> bool:
    """Whether ``abandon`` was called for this thread."""
    return bool(_abandoned) and threading.current_thread() in _abandoned


def raise_if_abandoned() -> None:
    """Raise ``Abandoned`` in a thread for which nobody waits."""
    if is_abandoned():
        raise Abandoned


class _Inside(threading.local):
    surroundings: Surroundings | None = None


_inside = _Inside()


class _Output:
    """Standard output for all threads but those that run an environment's code."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def write(self, text: str) -> int:
        """Write, or hand over to the surroundings that this thread is in."""
        if _inside.surroundings is None:
            return int(self.real.write(text))
        _inside.surroundings.print(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_outputs: deque[_Output] = deque(maxlen=64)
"""The last ones. In CPython 3.11 ``print`` has no reference of its own to the ``sys.stdout`` that it began with: one
that is made and freed at every step ends the process by a segmentation fault where another thread prints."""


def _output_before(real: Any) -> _Output:
    for output in _outputs:
        if output.real is real:
            return output
    _outputs.append(_Output(real))
    return _outputs[-1]


def _in_words(name: str, value: Any) -> Any:
    if name in _HANDLERS and isinstance(value, int):
        return signal.Handlers(value).name
    if name == "umask":
        return f"{value:03o}"
    if name == "logging_disabled":
        return logging.getLevelName(value)
    if name == "own_loggers":
        disabled, level = value
        return "nothing" if disabled else f"records of level {logging.getLevelName(level)}"
    return value


def _settings() -> _Settings:
    """The present settings."""
    torch = sys.modules.get("torch")
    # A module that is being imported has nothing yet.
    loaded = torch is not None and hasattr(torch, "get_default_dtype") and hasattr(torch, "get_num_threads")
    of_torch = (
        torch.get_default_dtype() if loaded and torch else None,
        torch.is_grad_enabled() if loaded and torch else None,
        torch.get_num_threads() if loaded and torch else None,
    )
    has_device = loaded and torch is not None and hasattr(torch, "get_default_device")
    try:
        directory = os.getcwd()
    except OSError:  # it is gone
        directory = None
    return _Settings(
        *of_torch,
        _default_device(torch) if has_device else None,
        torch.get_deterministic_debug_mode() if has_device and torch else None,
        {**np.geterr()},
        directory,
        list(warnings.filters),
        _signal.getsignal(_signal.SIGINT),
        _signal.getsignal(_signal.SIGTERM),
        _signal.getsignal(_signal.SIGHUP),
        _signal.getsignal(_signal.SIGPIPE),
        _umask(),
        socket.getdefaulttimeout(),
        _ROOT.manager.disable,
        _ROOT.level if _in_main_thread() else 0,
        [(handler, handler.level) for handler in _ROOT.handlers] if _in_main_thread() else [],
        (_OWN.disabled, _OWN.level),
    )


_ROOT, _OWN = logging.getLogger(), logging.getLogger("shoal")
_last_umask = 0o077


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _umask() -> int:
    """It is read by setting one. Where nobody has changed it, that is the same, so that no file of another thread is
    made with a wrong one."""
    global _last_umask
    found = os.umask(_last_umask)
    if found != _last_umask:
        _set_umask(found)
    return found


def _set_umask(umask: int) -> None:
    global _last_umask
    os.umask(umask)
    _last_umask = umask


def _default_device(torch: Any) -> str:
    """Of torch, whose own function takes as long as all other settings. A default device is a mode of its functions."""
    modes = getattr(torch._C, "_len_torch_function_stack", None)
    return str(torch.get_default_device()) if modes is None or modes() else "cpu"


def _apply(wanted: _Settings, now: _Settings) -> None:
    torch: Any = sys.modules.get("torch")
    if wanted.default_dtype is not None and wanted.default_dtype != now.default_dtype:
        torch.set_default_dtype(wanted.default_dtype)
    if wanted.gradients is not None and wanted.gradients != now.gradients:
        torch.set_grad_enabled(wanted.gradients)
    if wanted.torch_threads is not None and wanted.torch_threads != now.torch_threads:
        torch.set_num_threads(wanted.torch_threads)
    if wanted.device is not None and wanted.device != now.device:
        # With None it is the CPU, too, and no call of torch looks for it.
        torch.set_default_device(None if wanted.device == "cpu" else wanted.device)
    if wanted.determinism is not None and wanted.determinism != now.determinism:
        torch.set_deterministic_debug_mode(wanted.determinism)
    if wanted.numpy_errors != now.numpy_errors:
        np.seterr(**wanted.numpy_errors)
    if wanted.directory is not None and wanted.directory != now.directory:
        os.chdir(wanted.directory)
    if wanted.warning_filters != now.warning_filters:
        warnings.resetwarnings()  # which also forgets what the filters were found to say
        warnings.filters[:] = wanted.warning_filters  # type: ignore[index]
    if wanted.umask != now.umask:
        _set_umask(wanted.umask)
    if wanted.socket_timeout != now.socket_timeout:
        socket.setdefaulttimeout(wanted.socket_timeout)
    _apply_logging(wanted, now)
    if _in_main_thread():
        for number, handler, present in (
            (signal.SIGINT, wanted.interrupt, now.interrupt),
            (signal.SIGTERM, wanted.terminate, now.terminate),
            (signal.SIGHUP, wanted.hang_up, now.hang_up),
            (signal.SIGPIPE, wanted.broken_pipe, now.broken_pipe),
        ):
            # None is a handler that was not set by Python, which Python cannot set.
            if handler != present and handler is not None:
                signal.signal(number, handler)


def _apply_logging(wanted: _Settings, now: _Settings) -> None:
    if wanted.logging_disabled != now.logging_disabled:
        logging.disable(wanted.logging_disabled)
    # Another thread cannot tell what its environment does to the root logger from what the program does meanwhile.
    if wanted.root_level != now.root_level and _in_main_thread():
        _ROOT.setLevel(wanted.root_level)
    if wanted.root_handlers != now.root_handlers and _in_main_thread():
        _ROOT.handlers[:] = [handler for handler, _ in wanted.root_handlers]
        for handler, level in wanted.root_handlers:
            handler.setLevel(level)
    if wanted.own_loggers != now.own_loggers:
        disabled, level = wanted.own_loggers
        _OWN.disabled = disabled
        _OWN.setLevel(level)
        for name, logger in list(_ROOT.manager.loggerDict.items()):
            if name.startswith("shoal.") and isinstance(logger, logging.Logger):
                logger.disabled = disabled
                if logger.level == now.own_loggers[1] != level:
                    logger.setLevel(logging.NOTSET)
