"""``recall`` has the optimum that the learning tests rely on."""

from __future__ import annotations

import numpy as np
import pytest
from shoal.envs.boundary import DiscreteActions, StepRows
from shoal.envs.play import play
from shoal.envs.recall import RecallEnvironment
from shoal.envs.reference import RecallPlayer, random_return


def test_memory_earns_one() -> None:
    """Catches a cue or a go signal that is shown at the wrong step."""
    returns = play(RecallEnvironment(16, 0), RecallPlayer(), episodes=160)
    assert returns.mean == 1.0


@pytest.mark.parametrize("num_cues", [2, 4, 8])
def test_no_memory_earns_one_in_k(num_cues: int) -> None:
    """Catches a cue that leaks into later observations, or cues that are not equally likely."""
    env = RecallEnvironment(64, 1, num_cues=num_cues)
    assert isinstance(env.spec.actions, DiscreteActions)
    for guess in range(num_cues):
        returns = play(env, lambda obs, is_first, guess=guess: np.full(len(obs), guess), episodes=1920)
        assert abs(returns.mean - 1 / num_cues) < 0.06


def test_observation_after_the_first_holds_no_cue() -> None:
    """Catches the leak directly: between cue and go there is nothing but zeros."""
    env = RecallEnvironment(32, 2)
    obs = np.zeros((32, 5), dtype=np.float32)
    env.reset(obs)
    assert (obs[:, :4].sum(1) == 1).all()
    flags = [np.zeros(32, dtype=bool) for _ in range(3)]
    rows = StepRows(obs, flags[0], np.zeros(32, dtype=np.float32), flags[1], flags[2])
    for _ in range(40):
        env.step(np.zeros(32, dtype=np.int64), rows)
        assert (obs[:, :4].sum(1) == rows.is_first).all()


def test_delays_vary_and_episodes_drift_apart() -> None:
    """Catches lock step: all episodes would end in the same place of every unroll."""
    env = RecallEnvironment(256, 3, min_delay=2, max_delay=5)
    obs = np.zeros((256, 5), dtype=np.float32)
    env.reset(obs)
    flags = [np.zeros(256, dtype=bool) for _ in range(3)]
    rows = StepRows(obs, flags[0], np.zeros(256, dtype=np.float32), flags[1], flags[2])
    lengths = np.zeros(256, dtype=np.int64)
    for step in range(1, 8):
        env.step(np.zeros(256, dtype=np.int64), rows)
        lengths[rows.terminated & (lengths == 0)] = step
    # One step at the cue, then the delay, then the answer.
    assert set(lengths) == {4, 5, 6, 7}


def test_random_return_is_one_in_k() -> None:
    """Catches a bias in the reference figure that runs are compared with."""
    returns = random_return("recall", episodes=1280)
    assert returns.episodes == 1280
    assert abs(returns.mean - 0.25) < 4 * returns.standard_error


@pytest.mark.parametrize("kwargs", [{"num_cues": 1}, {"min_delay": 5, "max_delay": 4}, {"delay": -1}, {"num_envs": 0}])
def test_bad_options_are_refused(kwargs: dict[str, int]) -> None:
    """Catches tasks without a solution."""
    with pytest.raises(ValueError, match=str(next(iter(kwargs)).split("_")[-1])):
        RecallEnvironment(**{"num_envs": 4, "seed": 0, **kwargs})
