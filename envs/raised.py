"""What other people's code raised, in words that lead there."""

from __future__ import annotations

import traceback
from pathlib import Path


def raised(error: BaseException) -> str:
    """The error's type and message, and the file and line that raised it; in place of an empty message, that line."""
    what = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"{what}: {error}" if str(error) else what
    last = frames[-1]
    # The package and the path in it say enough; the rest is where it is installed.
    parts = Path(last.filename).parts
    if "site-packages" in parts:
        parts = parts[len(parts) - parts[::-1].index("site-packages") :]
    return f"{what}: {str(error) or last.line} ({Path(*parts)}:{last.lineno})"
