"""Everything that the README names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(?:tests/)?(test_\w+\.py(?:::\w+)?)`", README))))
def test_a_test_that_proves_something_exists(named):
    """A proof that was renamed or deleted, and is still promised."""
    file, _, name = named.partition("::")
    (path,) = [path for folder in (TESTS, TESTS / "service") if (path := folder / file).is_file()]
    text = path.read_text()
    assert f"def {name}(" in text or not name
