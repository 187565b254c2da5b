"""Files of one JSON object a line, to which a run appends for as long as it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line; half a line that a killed process left behind stays a line of its own.

    Raises:
        OSError: it cannot be written.
        ValueError: a number is not finite, which JSON does not know.
    """
    text = json.dumps(line, allow_nan=False).encode() + b"\n"
    with path.open("a+b") as file:
        torn = file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n"
        file.write((b"\n" if torn else b"") + text)
