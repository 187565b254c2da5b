"""Paths among the settings, which mean places below the directory that the command was given in.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shoal.deploy.settings.sections import Config

_OF_METRICS = ("tls_certificate", "tls_key", "token_file", "file_sd")


def with_absolute_paths(config: Config) -> Config:
    """The same settings, whatever becomes of the working directory: modules of the user's may change it when they are
    imported, and environments and callbacks at any time.

    But for ``run_dir``, which RUN/config.yaml has as it was given.
    """
    metrics = {name: _absolute(getattr(config.metrics, name)) for name in _OF_METRICS}
    return dataclasses.replace(
        config,
        resume=config.resume if config.resume in ("auto", "never") else _absolute(config.resume),
        metrics=dataclasses.replace(config.metrics, **metrics),
        cluster=dataclasses.replace(config.cluster, runtime_env=_with_absolute_code(config.cluster.runtime_env)),
    )


def _with_absolute_code(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Ray's ``working_dir`` and ``py_modules``: paths, or addresses of archives."""
    found = dict(runtime_env)
    if "working_dir" in found:
        found["working_dir"] = _absolute(found["working_dir"])
    if isinstance(found.get("py_modules"), list):
        found["py_modules"] = [_absolute(one) for one in found["py_modules"]]
    return found


def _absolute(path: Any) -> Any:
    return str(Path(path).absolute()) if isinstance(path, str) and path and "://" not in path else path
