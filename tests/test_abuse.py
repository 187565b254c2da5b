"""Hostile inputs at every intake: what once failed, and a few of what ``shoal bench abuse`` tries for minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attacks
import pytest
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = {"trajectories": 20, "checkpoints": 12, "settings": 12, "metrics": 8, "run-directories": 4}
"""Drawn from one seed: as many of each as take about a second."""


@pytest.fixture(scope="module", params=list(attacks.MODULES))
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """(name, target), opened once."""
    # One for all: two of them train the same run there.
    directory: Path = tmp_path_factory.getbasetemp() / "attacked"
    directory.mkdir(exist_ok=True)
    with attacks.opened(request.param, directory) as target:
        yield request.param, target


def test_what_once_failed_is_taken_or_refused(attacked: tuple[str, Any]) -> None:
    """Catches an input of the corpus that ends in an error of another type, a hang, a leak or a value out of range."""
    name, target = attacked
    for attack in attacks.corpus(name):
        assert target.attempt(attack) in ("taken", "refused"), attack


def test_hostile_inputs_are_taken_or_refused(attacked: tuple[str, Any]) -> None:
    """Catches the same in inputs that are drawn from one seed."""
    name, target = attacked
    outcomes = set()

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.attacks)
    def attempt(attack: attacks.Attack) -> None:
        outcomes.add(target.attempt(attack))

    attempt()
    assert outcomes <= {"taken", "refused", "not made"}
