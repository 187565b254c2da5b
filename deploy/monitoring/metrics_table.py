"""The table of metrics in deploy/docs/metrics.md, written by ``python -m shoal.deploy.monitoring``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal.deploy.monitoring.catalogue import CATALOGUE, INFO, CatalogueEntry

GUIDE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- begin: made by python -m shoal.deploy.monitoring -->", "<!-- end -->"


def rendered(guide: str) -> str:
    """Return the guide with its table made anew.

    Raises:
        ValueError: the guide has no markers for the table.
    """
    before, begin, rest = guide.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END} in the guide")
    return before + begin + "\n" + "\n".join(_rows()) + "\n" + end + after


def _rows() -> Iterator[str]:
    of_run = ", ".join(f"`{name}`" for name in [*(entry.name for entry in CATALOGUE if entry.of_run), *INFO])
    yield f"Where several policies are trained, all have the label `policy`, but for those of the whole run: {of_run}."
    yield ""
    yield "| metric | type | label | |"
    yield "|---|---|---|---|"
    for entry in CATALOGUE:
        label = f"`{entry.label}`" if entry.label else ""
        yield _row(entry.name, entry.kind, label, f"{entry.help}{_elsewhere(entry)}")
    for name, (help, _) in INFO.items():
        yield _row(name, "gauge", "several", help)


def _elsewhere(entry: CatalogueEntry) -> str:
    labelled = f"/{entry.label.upper()}" if entry.label else ""
    return f" In metrics.jsonl `{entry.history_name}{labelled}`." if entry.key else ""


def _row(name: str, kind: str, label: str, help: str) -> str:
    return f"| `{name}` | {kind} | {label} | {help.replace('|', chr(92) + '|')} |"
