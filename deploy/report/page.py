"""The parts of a report page, and its HTML: one file that loads nothing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
from markupsafe import Markup
from shoal.deploy.report.figure import DASHES, Figure, Json
from shoal.deploy.report.text import clean

HERE = Path(__file__).parent
GENERATOR = "shoal report"
State = Literal["good", "bad", "open", "plain"]
_DASHARRAYS = dict(zip(DASHES, ("none", "6 4", "2 3", "7 3 2 3"), strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One number of the headline."""

    label: str
    value: str
    note: str = ""
    state: State = "plain"


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts; the first column names, the others are numbers unless ``text``."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text: bool = False
    folded: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """A file shown unchanged in a block that opens on a click."""

    title: str
    text: str


class Link(NamedTuple):
    """A file beside the page."""

    text: str
    url: str


@dataclasses.dataclass(frozen=True, slots=True)
class Links:
    """Files that the page points to, and does not load."""

    title: str
    links: Sequence[Link]
    note: str


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    """A sentence of its own."""

    text: str
    state: State = "plain"


@dataclasses.dataclass(frozen=True, slots=True)
class LegendEntry:
    """Name, colour and dash of a line in a shared legend."""

    name: str
    color: str
    dash: str = "solid"
    shape: Literal["line", "area", "point"] = "line"

    @property
    def dasharray(self) -> str:
        """The dash pattern in SVG."""
        return _DASHARRAYS[self.dash]


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A chapter of the page. ``shared_legend``: the legend of figures whose own is ``shared``."""

    key: str
    title: str
    intro: str
    blocks: Sequence[Figure | Table | Plain | Note | Links]
    shared_legend: Sequence[LegendEntry] = ()

    @property
    def figures(self) -> list[Figure]:
        """The figures among its blocks."""
        return [block for block in self.blocks if isinstance(block, Figure)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """The content of a report."""

    title: str
    lead: Sequence[Note]
    facts: Sequence[Fact] = ()
    sections: Sequence[Section]
    made: str
    """Time and source of the report."""


def render(page: Page) -> str:
    """Return the page as HTML. All text is escaped, only the page's own scripts can run, and it can load nothing."""
    figures: list[Json] = [figure.to_plotly() for section in page.sections for figure in section.figures]
    scripts = [_plotly(), (HERE / "page.js").read_text(encoding="utf-8")]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            figures=figures,
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:",
            generator=GENERATOR,
        )
    )


def legend(figure: Figure) -> list[LegendEntry]:
    """Return the legend of a figure with several lines; the topmost stacked line comes first."""
    names: dict[str, LegendEntry] = {}
    for line in figure.lines:
        shape: Literal["line", "area", "point"] = "area" if figure.stacked else "point" if line.points else "line"
        names.setdefault(line.name, LegendEntry(line.name, line.color, line.dash, shape))
    if len(names) < 2 and figure.legend != "always":
        return []
    return list(names.values())[::-1] if figure.stacked else list(names.values())


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # A closing script tag inside a string would end the script.
    return str(get_plotlyjs()).replace("</script", r"<\/script").replace("<!--", r"<\!--")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.globals.update(legend=legend)
    environment.tests.update(
        figure=lambda block: isinstance(block, Figure),
        table=lambda block: isinstance(block, Table),
        plain=lambda block: isinstance(block, Plain),
        note=lambda block: isinstance(block, Note),
        links=lambda block: isinstance(block, Links),
    )
    return environment
