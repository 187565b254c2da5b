"""What the exports of a policy have in common."""

from __future__ import annotations


class CannotExport(ValueError):
    """What was asked for cannot be written; the message says why."""
