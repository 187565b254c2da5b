"""Default settings learn, whatever the units of rewards and observations: minutes, not seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from service import shoal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def played(directory: Path, *arguments: str) -> float:
    """Mean return of 100 episodes with the policy that a run with these arguments ended with."""
    done = shoal("train", *arguments, "metrics.port=-1", "run_dir=run", cwd=directory, timeout=600)
    assert done.returncode == 0, done.stderr
    done = shoal("evaluate", "run", "--json", "--episodes", "100", cwd=directory)
    found: float = json.loads(done.stdout)["mean_return"]
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("no_ray")
def test_a_newcomers_first_command_solves_cartpole(tmp_path: Path, seed: int) -> None:
    """Catches defaults with which nothing is learned on the first environment that anybody tries."""
    assert played(tmp_path, "env.id=CartPole-v1", "total_env_steps=100000", f"seed={seed}") >= 450


UNITS = {
    "small rewards, large observations": (0.001, "{reward: 0.001, scale: 1000.0}"),
    "large rewards, small observations": (1000.0, "{reward: 1000.0, scale: 0.001}"),
    "observations far from 0": (1.0, "{shift: 1000.0}"),
}


@pytest.mark.parametrize("units", UNITS)
def test_cartpole_in_other_units(tmp_path: Path, units: str) -> None:
    """Catches a loss, a gradient or an input whose size depends on the user's units."""
    reward, arguments = UNITS[units]
    environment = ["env.id=unit_envs:CartPoleInUnits-v1", f"env.kwargs={arguments}"]
    found = played(tmp_path, *environment, "mode=inline", "learner.num_threads=1", "seed=1", "total_env_steps=70000")
    assert found / reward >= 250  # 500 in most cases; a policy that learns nothing gets 22
