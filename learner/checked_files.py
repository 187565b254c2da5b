"""Reading and syncing the files of checkpoints, which others may have changed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST_JSON_BYTES = 64 * 2**20
"""Size from which on a ``state.json`` or a manifest is not read: one of ours has a few thousand."""


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. A pipe or a device might never end, or never begin.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it holds something else, or is too large to be one of ours.
    """
    with open_regular(path) as file:
        data = file.read(MOST_JSON_BYTES + 1)
    if len(data) > MOST_JSON_BYTES:
        raise ValueError(f"{path} has more than {MOST_JSON_BYTES:,} bytes")
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a regular file."""
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_archive(path: Path) -> None:
    """Check that an archive takes no more memory than it has bytes: a compressed one may take a thousand times as much.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no archive, or a part of it is compressed.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            compressed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError) as error:  # the latter for parts of an unknown version
        raise ValueError(f"{path} is no archive: {error}") from error
    if compressed:
        raise ValueError(f"{path} is compressed, which nothing is that a run saves: {', '.join(compressed[:3])}")


def sync(path: Path) -> None:
    """Have a file or directory on the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
