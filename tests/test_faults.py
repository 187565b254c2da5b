"""FAULTS.md: every row has its test, or says that there is none yet."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (TESTS.parent / "FAULTS.md").read_text().splitlines()
    if line.startswith("|") and not set(line) <= set("|-")
]
FAULTS = [row for row in ROWS if row[0] != "what happens to you"]
NAMED = sorted({name for row in FAULTS for name in re.findall(r"`(test_\w+\.py::\w+)`", row[-1])})


def functions_in(file: str) -> set[str]:
    """Names of the tests in a file, which is read and not imported."""
    [path] = [path for folder in (TESTS, TESTS / "service") if (path := folder / file).is_file()]
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_read() -> None:
    """Catches a page in another form, of which this file would check nothing."""
    assert len(FAULTS) > 60
    assert len(NAMED) > 90
    assert {len(row) for row in ROWS} == {3}


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_is_named_exists(named: str) -> None:
    """Catches a proof that was renamed or deleted, and is still promised."""
    file, _, name = named.partition("::")
    assert name in functions_in(file)


def test_every_row_is_shown_by_a_test_or_says_that_it_is_not() -> None:
    """Catches a statement that nothing shows, and a name that is none."""
    for what, does, shown in FAULTS:
        assert shown or "**Not yet**" in does, what
        assert re.fullmatch(r"(`test_\w+\.py::test_\w+`(, )?)*", shown), shown
