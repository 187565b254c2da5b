"""A page of `shoal report`, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from shoal.deploy.cli import main

VOID = {"meta", "link", "br", "path", "rect"}


class Document(HTMLParser):
    """A page taken apart: elements with their attributes, texts by element, and the data of its plots."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if attributes.get("id") == "figures":
            for each in json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")):
                self.figures[each["id"].removeprefix("plot-")] = each
        elif tag not in ("script", "style"):
            self.texts.append((tag, data))

    @property
    def text(self) -> str:
        """All that can be read."""
        return " ".join(" ".join(text for _, text in self.texts).split())

    def curve(self, key: str, name: str) -> tuple[list[Any], list[Any]]:
        """x and y of a line with a name, as plotly.js gets them."""
        found = [trace for trace in self.figures[key]["data"] if trace.get("name") == name]
        assert len(found) == 1, [trace.get("name") for trace in self.figures[key]["data"]]
        return found[0]["x"], found[0]["y"]


def report(*runs: Path, out: Path | None = None) -> Document:
    """The page that the command makes."""
    to = out or runs[0] / "other.html"
    assert main(["report", *map(str, runs), "--out", str(to)]) == 0
    return Document(to.read_text(encoding="utf-8"))
