"""The number of cases that properties of the memory are tried on: a few, or as many as ``SHOAL_FUZZ`` says."""

from __future__ import annotations

import os


def examples(default: int) -> int:
    """``max_examples`` of a property: ``default`` unless SHOAL_FUZZ asks for more."""
    return max(default, int(os.environ.get("SHOAL_FUZZ", "0")))
