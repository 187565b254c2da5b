"""EnvPool's tasks (``pip install envpool``; ``python tests/bench/families.py`` installs it where it is not here)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from shoal.deploy.settings.load import load_config
from shoal.deploy.training import run as training_run
from shoal.envs.boundary import ImageSpace, StepRows
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.registry import make_env_spec, make_vector_env


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gymnasium's own CartPole in the place of EnvPool's."""
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(EnvironmentNotFound, match=r"envpool:CartPole-v1' needs EnvPool .*: pip install envpool"):
        make_env_spec("envpool:CartPole-v1")


def rows_of(env_id: str, steps: int, seed: int, **kwargs: object) -> list[tuple[np.ndarray, ...]]:
    env = make_vector_env(env_id, 4, seed, **kwargs)
    flags = [np.zeros(4, dtype=bool) for _ in range(3)]
    obs = np.zeros((4, *env.spec.obs_shape), env.spec.obs_dtype)
    rows = StepRows(obs, flags[0], np.zeros(4, np.float32), flags[1], flags[2])
    rng, found = np.random.default_rng(1), []
    env.reset(rows.obs)
    for _ in range(steps):
        env.step(rng.integers(2, size=4), rows)
        found.append(tuple(array.copy() for array in rows[:5]))
    assert env.faults == []
    env.close()
    return found


def test_episodes_are_those_of_the_next_step_form() -> None:
    """Catches an episode whose end or beginning is a step late, and slots that are taken for one another."""
    pytest.importorskip("envpool")
    time, ends = np.zeros(4), 0
    for obs, is_first, reward, terminated, truncated in rows_of("envpool:CartPole-v1", 300, 0):
        time = np.where(is_first, 0, time + 1)
        assert not reward[is_first].any()
        assert (np.abs(obs[is_first]) <= 0.05).all()
        out = (np.abs(obs[:, 0]) > 2.4) | (np.abs(obs[:, 2]) > 12 * np.pi / 180)
        np.testing.assert_array_equal(terminated, out & ~is_first)
        assert not truncated.any()
        ends += int(terminated.sum())
    assert ends > 20


def test_a_seed_determines_everything() -> None:
    """Catches a pool that keeps the seed it was made with."""
    pytest.importorskip("envpool")
    one, same, other = (rows_of("envpool:CartPole-v1", 60, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for x, y in zip(one, same, strict=True) for a, b in zip(x, y, strict=True))
    assert any(not np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_frames_of_atari_are_an_image() -> None:
    """Catches a stack of frames that is read as numbers."""
    pytest.importorskip("envpool")
    spec = make_env_spec("envpool:Pong-v5")
    assert isinstance(spec.observation, ImageSpace)
    assert (spec.observation.height, spec.observation.width, spec.observation.channels) == (84, 84, 4)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "error", "said"),
    [
        ("envpool:CartPol-v1", {}, EnvironmentNotFound, "EnvPool has no task 'CartPol-v1'; did you mean CartPole-v1"),
        ("envpool:CartPole-v1", {"gravity_": 1}, ValueError, "gravity_"),
        ("envpool:CartPole-v1", {"batch_size": 2}, ValueError, "batch_size=2: all 1 slots are stepped together"),
    ],
)
def test_what_cannot_be_made_is_said(env_id: str, kwargs: dict[str, int], error: type[Exception], said: str) -> None:
    """Catches an AssertionError without words."""
    pytest.importorskip("envpool")
    with pytest.raises(error, match=said):
        make_env_spec(env_id, **kwargs)


def test_a_run_trains_it(tmp_path: Path) -> None:
    """Catches a pool that only the adapter steps."""
    pytest.importorskip("envpool")
    settings = [
        *("env.id=envpool:CartPole-v1", "env.num_envs=4", "mode=inline", "metrics.port=-1", "learner.epochs=1"),
        *("actor.unroll_length=8", "learner.batch_size=4", "learner.minibatches=2", "evaluation.random_seconds=1"),
        *("total_env_steps=600", "policy.kind=component", "policy.components={lstm: {size: 8}}"),
    ]
    config, problems = load_config((), settings)
    assert problems == []
    summary = training_run.run(config, tmp_path / "run", quiet=True, owns_process=False).summary
    assert summary["books_balance"]
    assert summary["episodes"] > 5
    assert summary["random_return"] > 5
