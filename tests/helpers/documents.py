"""README and the pages of the site as tests read them: their fenced blocks, and the commands in them.

A block of ```` ```bash ```` or ```` ```python ```` is run as it stands. A comment in the line above it says otherwise:

- ``<!-- run with: SETTINGS -->``: every ``shoal train`` of the block gets these settings as well, so that it is short;
- ``<!-- fails: CODE -->``: its last command ends with this exit code;
- ``<!-- not run: REASON -->``: it is only checked: commands, options, settings, modules, files and targets exist;
- ``<!-- file: NAME -->``: it is a file that the commands of the page read.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "deploy" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<how>[a-z ]+): ?(?P<what>.*?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
HOW = ("run with", "fails", "not run", "file")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    how: str
    """One of ``HOW``, or empty."""
    what: str
    """What the comment says behind it."""

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            match["how"] or "",
            match["what"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def commands(code: str) -> Iterator[list[str]]:
    """Every command of a shell block, as words without the assignments of variables before them."""
    for line in re.sub(r"(?m)(?:^|\s)#.*$", "", code.replace("\\\n", " ")).splitlines():
        for part in re.split(r"&&|\|\||;", line) if "'" not in line else [line]:
            words = shlex.split(part, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words:
                yield words
