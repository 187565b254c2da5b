"""What takes long is named while it does: a run that waits for other people's code is never silent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from shoal.deploy.doctor import preflight
from shoal.deploy.records import waits
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.run import run
from shoal.envs.config import EnvConfig

LONGEST = 10.0
made: list[int] = []
released = threading.Event()


class SlowToBeMade(gymnasium.Env[Any, Any]):
    """Its ``at``-th copy is not made before ``released`` is set."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, at: int) -> None:
        made.append(1)
        if len(made) == at:
            assert released.wait(LONGEST)

    def reset(self, **_kwargs: Any) -> Any:
        """Begin an episode."""
        return self.observation_space.sample(), {}

    def step(self, _action: Any) -> Any:
        """Take a step."""
        return self.observation_space.sample(), 0.0, False, False, {}


gymnasium.register("SlowToBeMade-v0", SlowToBeMade)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits are told at once; whoever waits goes on after that."""
    made.clear()
    released.clear()
    monkeypatch.setattr(waits, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(waits.log, "warning", lambda *_arguments: released.set())
    yield
    released.set()


def config(at: int) -> Config:
    return Config(
        mode="inline",
        total_env_steps=64,
        env=EnvConfig(id="SlowToBeMade-v0", kwargs={"at": at}, num_envs=2),
    )


def test_a_slow_environment_is_told_before_the_run() -> None:
    """Catches a check of the settings that waits in silence: the environment goes on only when it is told."""
    assert preflight.make(config(1), ()).problems == ()
    assert released.is_set()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_slow_environment_is_told_by_the_run(at: int, tmp_path: Path) -> None:
    """Catches one of the places where a run makes environments that waits in silence."""
    run(config(at), tmp_path / "run", quiet=True)
    assert released.is_set()


def test_what_is_quick_is_not_told() -> None:
    """Catches a warning after the end of the wait."""
    with waits.told_if_slow("this"):
        pass
    assert not released.wait(0.2)
