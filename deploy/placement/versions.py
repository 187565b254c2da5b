"""Versions of everything that may make two runs, or two machines of one run, differ."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Version by package; packages that are not installed are left out."""
    names = ("shoal", "torch", "ray", "gymnasium", "numpy", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
