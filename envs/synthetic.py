"""``synthetic``: an environment that costs next to nothing, for benchmarks of everything else.

Observations and rewards come from a pool that is made once from the seed; actions change nothing and nothing can be
learned. Every episode is truncated after the same number of steps. Made by ``envs.registry``; it never runs Python per
slot.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from shoal.envs.boundary import DiscreteActions, EnvSpec, StepRows, TokenSpace
from shoal.envs.plain_state import DoesNotFit, read_arrays, read_generator, to_plain

PADDING = 0xFF
POOL_ROWS = 1024
POOL_STRIDE = 331
"""Rows of the pool that a step advances; odd, so that all ``POOL_ROWS`` places are visited before one comes again."""


class SyntheticEnvironment:
    """Observation: tokens [num_tokens, 3] of which ``used_tokens`` lie in distinct places, the others are padding."""

    def __init__(
        self,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        num_features: int = 25,
        window: int = 11,
        num_tokens: int = 200,
        used_tokens: int = 100,
        num_actions: int = 5,
        episode_length: int = 128,
        together: bool = False,
        step_seconds: float = 0.0,
    ) -> None:
        """Make the pool.

        Args:
            num_envs: Slots.
            seed: Determines the pool and where in their first episode staggered slots begin.
            num_features: Feature ids that tokens have; with ``window`` the size of the network's first layer.
            window: Width and height of the window that tokens lie in.
            num_tokens: Rows of an observation.
            used_tokens: Tokens of an observation that are not padding.
            num_actions: Actions to choose from.
            episode_length: Steps after which an episode is truncated.
            together: All slots end in the same step. Otherwise their first episodes have evenly spread lengths (and
                are marked in ``short_episode``), so that about as many slots end in every step.
            step_seconds: How long every step sleeps, whatever the number of slots.
        """
        _check("num_envs", num_envs, 1, None)
        _check("num_features", num_features, 1, 256)
        # A window of 16 would have a cell whose coordinate is that of padding.
        _check("window", window, 1, 15)
        _check("num_tokens", num_tokens, 1, None)
        _check("used_tokens", used_tokens, 0, min(num_tokens, num_features * window * window))
        _check("num_actions", num_actions, 2, None)
        _check("episode_length", episode_length, 1, None)
        if not isinstance(together, bool):
            raise ValueError(f"synthetic: together={together!r} must be true or false")
        if isinstance(step_seconds, bool) or not isinstance(step_seconds, int | float) or not 0 <= step_seconds <= 3600:
            raise ValueError(f"synthetic: step_seconds={step_seconds!r} must be a number from 0 to 3600")
        self.spec = EnvSpec(
            env_id="synthetic",
            observation=TokenSpace(
                width=window,
                height=window,
                num_tokens=num_tokens,
                feature_names=tuple(f"feature_{feature}" for feature in range(num_features)),
                feature_normalizations=(255.0,) * num_features,
            ),
            actions=DiscreteActions(names=(tuple(f"action_{action}" for action in range(num_actions)),)),
        )
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self._num_actions = num_actions
        self._episode_length = episode_length
        self._together = together
        self._step_seconds = step_seconds
        self._rng = np.random.default_rng(seed)
        self._sizes = (num_features, window, num_tokens, used_tokens)
        self._make_pool()
        self._offset = 0
        self._until_end = np.zeros(num_envs, dtype=np.int64)
        """Steps until the episode is truncated; 0 once it has been."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, num_tokens, 3]."""
        self._until_end[:] = self._episode_length
        if not self._together:
            phase = 1.0 - self._rng.random()
            spread = (np.arange(self.num_envs) + phase) / self.num_envs
            self._until_end[:] = np.maximum(1, np.rint(self._episode_length * spread))
        np.less(self._until_end, self._episode_length, out=self.short_episode)
        self._write(obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` int64 [B] and fill ``rows``."""
        if action.min() < 0 or action.max() >= self._num_actions:
            raise ValueError(
                f"synthetic: actions from {action.min()} to {action.max()}, must be 0..{self._num_actions - 1}"
            )
        if self._step_seconds:
            time.sleep(self._step_seconds)
        first = np.equal(self._until_end, 0, out=rows.is_first)
        self._until_end -= 1
        np.copyto(self._until_end, self._episode_length, where=first)
        np.copyto(self.short_episode, False, where=first)
        np.equal(self._until_end, 0, out=rows.truncated)
        rows.terminated[:] = False
        np.copyto(rows.reward, self._reward[self._offset : self._offset + self.num_envs])
        np.copyto(rows.reward, 0.0, where=first)
        self._write(rows.obs)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``; the pool as the stream that it is made of."""
        return {
            "until_end": self._until_end.copy(),
            "short_episode": self.short_episode.copy(),
            "offset": self._offset,
            "pool": self._before_pool,
        }

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``."""
        try:
            arrays = read_arrays(state, {"until_end": self._until_end, "short_episode": self.short_episode})
            until_end, offset = arrays["until_end"], state.get("offset")
            if until_end.min() < 0 or until_end.max() > self._episode_length:
                raise DoesNotFit("the length of an episode is out of range")
            if type(offset) is not int or not 0 <= offset < POOL_ROWS:
                raise DoesNotFit(f"offset {offset!r} must be a whole number below {POOL_ROWS}")
            generator = read_generator(state.get("pool"))
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        self._rng, self._offset = generator, offset
        self._make_pool()
        self._until_end[:], self.short_episode[:] = until_end, arrays["short_episode"]
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def _make_pool(self) -> None:
        """Draw observations and rewards."""
        self._before_pool = to_plain(self._rng)
        # Slot b reads row offset + b, so the rows behind the last offset need no wrapping around.
        rows = POOL_ROWS + self.num_envs
        self._obs = self._make_observations(rows, *self._sizes)
        self._reward = self._rng.normal(scale=0.1, size=rows).astype(np.float32)

    def _write(self, obs: np.ndarray) -> None:
        self._offset = (self._offset + POOL_STRIDE) % POOL_ROWS
        np.copyto(obs, self._obs[self._offset : self._offset + self.num_envs])

    def _make_observations(self, rows: int, features: int, window: int, tokens: int, used: int) -> np.ndarray:
        """uint8 [rows, tokens, 3]; no two tokens of a row share cell and feature, and they come cell by cell."""
        pool = np.full((rows, tokens, 3), PADDING, dtype=np.uint8)
        places = np.arange(features * window * window)
        chosen = np.sort([self._rng.choice(places, used, replace=False, shuffle=False) for _ in range(rows)], axis=1)
        cell, feature = chosen // features, chosen % features
        pool[:, :used, 0] = (cell // window) << 4 | cell % window
        pool[:, :used, 1] = feature
        pool[:, :used, 2] = self._rng.integers(1, 256, size=chosen.shape)
        return pool


def _check(name: str, value: int, lowest: int, highest: int | None) -> None:
    """Raise ValueError unless the value is an integer from ``lowest`` to ``highest``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and lowest <= value and (highest is None or value <= highest):
        return
    limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
    raise ValueError(f"synthetic: {name}={value!r} must be a whole number {limits}")
