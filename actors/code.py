"""Which code a process runs: every process of a run must run the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("actors", "deploy", "envs", "learner", "policy")


class Code(NamedTuple):
    """The packages of one installation."""

    root: str
    """Where they lie; may differ from machine to machine."""
    sha256: str
    """Of all their modules."""


@functools.cache
def this_code() -> Code:
    """What this process runs."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        # Each may lie somewhere else: Ray unpacks what it is given package by package.
        place = package_place(package)
        for path in sorted(place.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(place).as_posix()} {len(content)}\n".encode() + content)
    return Code(str(package_place("actors").parent), digest.hexdigest())


def package_place(package: str) -> Path:
    """The folder that ``import package`` finds."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {package} of shoal is not installed here")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def check_same_code(expected: Code | None) -> None:
    """Raises RuntimeError where this process runs other code than the learner that started it."""
    here = this_code()
    if expected is not None and here.sha256 != expected.sha256:
        raise RuntimeError(
            f"this process runs the code in {here.root} ({here.sha256[:12]}), the learner that in {expected.root} "
            f"({expected.sha256[:12]}): install the same checkout in both (pip install -e .)"
        )
