"""The boundary contract, by a checker that knows no adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
from make_env import make_env
from shoal.envs.boundary import StepRows, VectorEnvironment
from shoal.envs.reference import random_player

NUM_STEPS = 450


class Rollout:
    """The answers of ``steps`` calls, time first: row t of ``obs`` and ``is_first`` is before action t."""

    def __init__(self, env: VectorEnvironment, steps: int, seed: int = 0) -> None:
        spec, slots = env.spec, env.num_envs
        # [B, T+1, ...] as the rollout worker has it: every view into it is strided.
        self.obs = np.full((slots, steps + 1, *spec.obs_shape), 77, dtype=spec.obs_dtype)
        self.is_first = np.zeros((slots, steps + 1), dtype=bool)
        self.is_first[:, 0] = True
        self.reward = np.full((slots, steps), np.nan, dtype=np.float32)
        self.terminated = np.ones((slots, steps), dtype=bool)
        self.truncated = np.ones((slots, steps), dtype=bool)
        self.final_obs = np.full((slots, steps, *spec.obs_shape), 77, dtype=spec.obs_dtype) if spec.same_step else None
        self.short = np.zeros((slots, steps), dtype=bool)
        player = random_player(spec, np.random.default_rng(seed))
        env.reset(self.obs[:, 0])
        for t in range(steps):
            self.short[:, t] = getattr(env, "short_episode", False)
            action = player(self.obs[:, t], self.is_first[:, t])
            assert action.shape == (slots, *spec.action_shape)
            rows = StepRows(
                self.obs[:, t + 1],
                self.is_first[:, t + 1],
                self.reward[:, t],
                self.terminated[:, t],
                self.truncated[:, t],
                None if self.final_obs is None else self.final_obs[:, t],
            )
            env.step(action.astype(spec.action_dtype), rows)


def check_void_after_ends(rollout: Rollout) -> None:
    """Every row after an end is void, and no other is."""
    ended = rollout.terminated | rollout.truncated
    assert ended.any(), "too few steps to end an episode"
    if rollout.final_obs is not None:
        np.testing.assert_array_equal(rollout.is_first[:, 1:], ended)
    else:
        np.testing.assert_array_equal(rollout.is_first[:, 2:], ended[:, :-1])
        assert not rollout.is_first[:, 1].any()


def check_void_rows(rollout: Rollout) -> None:
    """A void transition pays nothing and ends nothing."""
    if rollout.final_obs is not None:
        return
    void = rollout.is_first[:, 1:]
    assert (rollout.reward[void] == 0).all()
    assert not rollout.terminated[void].any()
    assert not rollout.truncated[void].any()


def check_every_row_is_written(rollout: Rollout) -> None:
    """No row is left as it was allocated."""
    assert np.isfinite(rollout.reward).all()
    assert not (rollout.terminated & rollout.truncated).all()
    assert not (rollout.obs == 77).reshape(*rollout.is_first.shape, -1).all(2).any()


def check_seeds(adapter: tuple[str, int, dict[str, Any]], rollout: Rollout) -> None:
    """Equal seeds give equal data, other seeds others."""
    env_id, slots, kwargs = adapter
    sequence = np.random.SeedSequence(7)
    make_env(env_id, slots, sequence, **kwargs).close()
    env = make_env(env_id, slots, sequence, **kwargs)
    again = Rollout(env, 60)
    env.close()
    np.testing.assert_array_equal(again.obs, rollout.obs[:, :61])
    np.testing.assert_array_equal(again.reward, rollout.reward[:, :60])
    other = make_env(env_id, slots, 8, **kwargs)
    different = Rollout(other, 60)
    other.close()
    assert not np.array_equal(different.obs, rollout.obs[:, :61])
