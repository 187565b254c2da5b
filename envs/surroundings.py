"""Keeps what belongs to the whole process apart: an environment finds the settings that it left, everybody else theirs.

Other people's code changes torch's default type, the working directory or signal handlers, and prints. Adapters that
run it in their own process do so inside ``Surroundings``, once per step of all slots.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ``signal`` makes a member of an enumeration of every answer
import os
import signal
import sys
import threading
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from shoal.envs.reports import Reports

SHOWN_LINES = 3
"""Lines that an environment prints which are shown; the rest is counted."""
PRINTED, CHANGED = "printed", "process_setting"
"""Remarks: it printed a line; it changed a setting of the process."""


class _Settings(NamedTuple):
    """Settings of the process; torch's are None where torch is not imported."""

    default_dtype: Any
    gradients: bool | None
    torch_threads: int | None
    directory: str | None
    warning_filters: list[Any]
    interrupt: Any
    terminate: Any
    hang_up: Any


_WORDS = {
    "default_dtype": "torch's default type",
    "gradients": "whether torch records gradients",
    "torch_threads": "torch's number of threads",
    "directory": "the working directory",
    "interrupt": "what SIGINT does",
    "terminate": "what SIGTERM does",
    "hang_up": "what SIGHUP does",
}
"""Settings whose change is worth a remark: libraries change the filters of warnings as a matter of course."""
_HANDLERS = ("interrupt", "terminate", "hang_up")


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
        self._outside = self._begun = _settings()
        if self._own:
            self._begun = self._outside._replace(**self._own)
            _apply(self._begun, self._outside)
        if not isinstance(sys.stdout, _Output):
            sys.stdout = _Output(sys.stdout)
        _inside.surroundings = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _inside.surroundings = None
        if isinstance(sys.stdout, _Output):
            sys.stdout = sys.stdout.real
        left = _settings()
        if self._begun.default_dtype is None and left.default_dtype is not None:
            # Imported just now: what others will expect is what torch begins with.
            fresh = {"default_dtype": sys.modules["torch"].float32, "gradients": True}
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
            self._own[name] = now
            if now == outside:
                del self._own[name]
            elif name in _WORDS and name not in self._told:
                self._told.add(name)
                old, new = _in_words(name, before), _in_words(name, now)
                said = f"{self._env_id} changes {_WORDS[name]} from {old} to {new}; that is kept for it alone"
                self.reports.remark(CHANGED, 1, said)

    def print(self, text: str) -> None:
        """Take what the environment prints: the first lines are shown, on standard error, and all are counted."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            if not line.strip():
                continue
            self._lines += 1
            if self._lines <= SHOWN_LINES:
                more = "; what it prints from here on is not shown" if self._lines == SHOWN_LINES else ""
                print(f"{self._env_id} prints: {line[:200]}{more}", file=sys.stderr)
            self.reports.remark(PRINTED, 1, f"{self._env_id} prints: {line[:200]}")


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


def _in_words(name: str, value: Any) -> Any:
    return signal.Handlers(value).name if name in _HANDLERS and isinstance(value, int) else value


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
    try:
        directory = os.getcwd()
    except OSError:  # it is gone
        directory = None
    return _Settings(
        *of_torch,
        directory,
        list(warnings.filters),
        _signal.getsignal(_signal.SIGINT),
        _signal.getsignal(_signal.SIGTERM),
        _signal.getsignal(_signal.SIGHUP),
    )


def _apply(wanted: _Settings, now: _Settings) -> None:
    torch: Any = sys.modules.get("torch")
    if wanted.default_dtype is not None and wanted.default_dtype != now.default_dtype:
        torch.set_default_dtype(wanted.default_dtype)
    if wanted.gradients is not None and wanted.gradients != now.gradients:
        torch.set_grad_enabled(wanted.gradients)
    if wanted.torch_threads is not None and wanted.torch_threads != now.torch_threads:
        torch.set_num_threads(wanted.torch_threads)
    if wanted.directory is not None and wanted.directory != now.directory:
        os.chdir(wanted.directory)
    if wanted.warning_filters != now.warning_filters:
        warnings.resetwarnings()  # which also forgets what the filters were found to say
        warnings.filters[:] = wanted.warning_filters  # type: ignore[index]
    if threading.current_thread() is threading.main_thread():
        for number, handler, present in (
            (signal.SIGINT, wanted.interrupt, now.interrupt),
            (signal.SIGTERM, wanted.terminate, now.terminate),
            (signal.SIGHUP, wanted.hang_up, now.hang_up),
        ):
            # None is a handler that was not set by Python, which Python cannot set.
            if handler != present and handler is not None:
                signal.signal(number, handler)
