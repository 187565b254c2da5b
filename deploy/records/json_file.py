"""Files of one JSON object."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace ``path`` atomically by ``data`` as strict JSON; NaN and infinity become null."""
    clean = json.loads(json.dumps(data), parse_constant=lambda _: None)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(clean, indent=1) + "\n")
    os.replace(temporary, path)
