"""Everything that can be known to be wrong before a process is started."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path

from deploy.config import Config


def check(config: Config, run_dir: Path) -> list[str]:
    """All problems, each with the setting it comes from."""
    return [*_environment(config), *_device(config), *_metrics(config), *_run_dir(config, run_dir), *_resume(config)]


def _environment(config: Config) -> list[str]:
    from envs.registry import make_env_spec

    try:
        make_env_spec(config.env.id, **config.env.kwargs)
    except Exception as error:
        # Environments are other people's code: whatever they raise when made is this setting's problem.
        text = str(error) or repr(error)
        return [
            f"env.id: {text}"
            if isinstance(error, ValueError)
            else f"env.id: {config.env.id}: {type(error).__name__}: {text}"
        ]
    return []


def _device(config: Config) -> list[str]:
    from learner.device import check_device

    problem = check_device(config.learner)
    return [f"learner.{problem}"] if problem else []


def _metrics(config: Config) -> list[str]:
    address, port = config.metrics.address, config.metrics.port
    if port <= 0:
        return []
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server will: a port in TIME_WAIT after an earlier run is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return [f"metrics.port: {port} on {address} is in use; choose another, or metrics.port=0 for a free one"]
        return [f"metrics.address: cannot listen on {address}:{port}: {error}"]
    return []


def _run_dir(config: Config, run_dir: Path) -> list[str]:
    if run_dir.exists() and not run_dir.is_dir():
        return [f"run_dir: {run_dir} is a file"]
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return [f"run_dir: cannot write to {existing}: {os.strerror(error.errno or 0)}; choose another run_dir"]
    if config.resume == "never" and (run_dir / "checkpoints").is_dir():
        return [f"resume: run_dir {run_dir} holds checkpoints; resume=auto continues them, or choose another run_dir"]
    return []


def _resume(config: Config) -> list[str]:
    if config.resume in ("auto", "never"):
        return []
    from learner.checkpoint import CheckpointError, find_checkpoint

    try:
        find_checkpoint(Path(config.resume))
    except CheckpointError as error:
        return [f"resume: {error}"]
    return []
