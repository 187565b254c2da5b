"""Numbers and other people's texts, as a page shows them."""

from __future__ import annotations

import datetime
import html
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")


def clean(text: object) -> str:
    """Without what terminals and the direction of text are steered by."""
    return _CONTROL.sub("\ufffd", str(text))


def plotly_text(text: str) -> str:
    """What plotly.js draws as ``text``: it reads tags and entities."""
    return html.escape(clean(text), quote=False)


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def number(value: float | None) -> str:
    """Four digits that count, and no fewer than the whole ones."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def margin(half_width: float) -> str:
    """Two digits that count, and no fewer than the whole ones."""
    return f"\u00b1 {half_width:,.0f}" if half_width >= 100 else f"\u00b1 {half_width:.2g}"


def duration(seconds: float) -> str:
    """The two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2] if amount or len(parts) == 1)


def moment(timestamp: float) -> str:
    """Unix seconds as UTC."""
    try:
        at = datetime.datetime.fromtimestamp(timestamp, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    return f"{at:%Y-%m-%d %H:%M} UTC"


def several(amount: float, one: str, many: str = "") -> str:
    """``1 actor``, ``2 actors``."""
    return f"{amount:,.0f} {one if amount == 1 else many or one + 's'}"
