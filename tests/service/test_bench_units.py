"""The benchmark of units still runs, and says returns in the environment's own unit."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "units.py"))


@pytest.mark.parametrize("units", ["rewards x 1000", "observations + 1000"])
def test_returns_are_in_the_own_unit(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a return in the unit that was tried, and an environment whose arguments do not arrive."""
    monkeypatch.setitem(BENCH["TASKS"], "recall", ("Recall", 2_000))
    assert 0.05 < BENCH["trained"]("recall", units, 1) <= 1
