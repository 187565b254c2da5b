"""One file of plain data: mappings, lists, numbers and texts as JSON, numpy arrays beside it. Nothing in it is run.

An uncompressed ``.npz``, read with ``allow_pickle=False``: array ``document`` is the JSON as uint8, and in it
``{"#": "array", "number": n}`` stands for array ``n``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from shoal.learner.checked_files import check_archive

_KIND = "#"


def save_plain(path: Path, value: Any) -> None:
    """Write ``value``, whose mappings have texts as keys.

    Raises:
        TypeError: something in it is no plain data.
    """
    arrays: list[np.ndarray] = []
    document = json.dumps(_take_out(value, arrays)).encode()
    numbered = {str(number): array for number, array in enumerate(arrays)}
    with path.open("wb") as file:
        np.savez(file, document=np.frombuffer(document, np.uint8), allow_pickle=False, **numbered)


def load_plain(path: Path) -> Any:
    """What ``save_plain`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    with _opened(path) as arrays:
        return _put_back(json.loads(arrays["document"].tobytes()), arrays)


def load_document(path: Path) -> Any:
    """What ``save_plain`` wrote, without its arrays, which are not read: mappings with their numbers stand for them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    with _opened(path) as arrays:
        return json.loads(arrays["document"].tobytes())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a file by name, each read where it is asked for. Raises what ``load_plain`` does."""
    try:
        check_archive(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and numpy raise errors of any class for damaged archives
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _take_out(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufcSU":
            raise TypeError(f"arrays of {value.dtype} are no plain data")
        arrays.append(value)
        return {_KIND: "array", "number": len(arrays) - 1}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping has other keys than texts")
        return {key: _take_out(part, arrays) for key, part in value.items()}
    if isinstance(value, list):
        return [_take_out(part, arrays) for part in value]
    return value


def _put_back(value: Any, arrays: Any) -> Any:
    if isinstance(value, dict):
        if value.get(_KIND) == "array":
            return arrays[str(value["number"])]
        return {key: _put_back(part, arrays) for key, part in value.items()}
    if isinstance(value, list):
        return [_put_back(part, arrays) for part in value]
    return value
