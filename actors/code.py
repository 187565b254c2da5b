"""The installed package: its hash, equal in all processes of a run, and a copy of it for other nodes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import shoal

PACKAGE_PLACE = Path(next(iter(shoal.__path__))).resolve()
"""The folder that ``import shoal`` finds: a checkout's root, or ``shoal`` in site-packages."""
SUBPACKAGES = ("actors", "deploy", "envs", "learner", "policy")
"""The folders of a checkout's root that belong to the package; tests, .venv and runs do not."""


class Code(NamedTuple):
    """The package of one installation."""

    root: str
    """The folder it lies in; may differ from machine to machine."""
    sha256: str
    """SHA-256 of all its modules."""


@functools.cache
def this_code() -> Code:
    """The code that this process runs."""
    digest = hashlib.sha256()
    for path in _files():
        if path.suffix == ".py":
            content = path.read_bytes()
            name = path.relative_to(PACKAGE_PLACE).as_posix()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return Code(str(PACKAGE_PLACE), digest.hexdigest())


def _files() -> list[Path]:
    found = [path for path in PACKAGE_PLACE.iterdir() if path.suffix == ".py" or path.name == "py.typed"]
    for package in SUBPACKAGES:
        found += (path for path in (PACKAGE_PLACE / package).rglob("*") if path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


@contextlib.contextmanager
def packaged() -> Iterator[Path]:
    """A folder named ``shoal`` that holds the package and nothing else, for the length of the block.

    A checkout's root has another name, and more in it than other machines need.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-code-") as scratch:
        place = Path(scratch) / "shoal"
        for path in _files():
            copy = place / path.relative_to(PACKAGE_PLACE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        yield place


def check_same_code(expected: Code | None) -> None:
    """Raises RuntimeError where this process runs other code than the learner that started it."""
    here = this_code()
    if expected is not None and here.sha256 != expected.sha256:
        raise RuntimeError(
            f"this process runs the code in {here.root} ({here.sha256[:12]}), the learner that in {expected.root} "
            f"({expected.sha256[:12]}): install the same checkout in both (pip install -e .)"
        )
