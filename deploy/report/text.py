"""Formats numbers and untrusted text for a page."""

from __future__ import annotations

import datetime
import html
import os
import re
import urllib.parse
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


def clean(text: object) -> str:
    """Return text without control characters and marks of writing direction."""
    return _CONTROL.sub("\ufffd", str(text))


def plotly_text(text: str) -> str:
    """Escape text for plotly.js, which interprets tags and entities."""
    return html.escape(clean(text), quote=False)


def relative_url(path: Path, folder: Path) -> str:
    """Return the address of a file as a page in ``folder`` may link it."""
    # A colon in the first part would begin a scheme, and names may look like javascript:.
    return "./" + urllib.parse.quote(os.path.relpath(path.resolve(), folder.resolve()))


def count(value: float) -> str:
    """Format a number without decimals."""
    return f"{value:,.0f}"


def number(value: float | None) -> str:
    """Format a number with four significant digits, or all integer digits if there are more."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def margin(half_width: float) -> str:
    """Format a half width with two significant digits, or all integer digits if there are more."""
    return f"\u00b1 {half_width:,.0f}" if half_width >= 100 else f"\u00b1 {half_width:.2g}"


def duration(seconds: float) -> str:
    """Format seconds in their two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2] if amount or len(parts) == 1)


def moment(timestamp: float) -> str:
    """Format Unix seconds as UTC."""
    try:
        at = datetime.datetime.fromtimestamp(timestamp, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    return f"{at:%Y-%m-%d %H:%M} UTC"


def several(amount: float, one: str, many: str = "") -> str:
    """Format a count with its noun: ``1 actor``, ``2 actors``."""
    return f"{amount:,.0f} {one if amount == 1 else many or one + 's'}"
