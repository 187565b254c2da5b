"""``recall``: a memory task with a known optimum, stepped in numpy for all slots at once.

A cue, one of ``num_cues``, is shown on an episode's first step only. Blank steps follow. Then comes a go signal, and
the action taken there earns 1 if it equals the cue, else 0, and ends the episode (terminated). Without memory the best
return is 1 / num_cues, with memory it is 1. Made by ``envs.registry``; it never runs Python per slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from shoal.envs.boundary import DiscreteActions, EnvSpec, StepRows, VectorSpace
from shoal.envs.plain_state import DoesNotFit, read_arrays, read_generator, to_plain


class RecallEnvironment:
    """Observation: the cue one-hot [num_cues] on the first step, zeros after; then a go flag. One action per cue."""

    def __init__(
        self,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        num_cues: int = 4,
        delay: int | None = None,
        min_delay: int = 4,
        max_delay: int = 8,
    ) -> None:
        """Make the task.

        Args:
            num_envs: Slots.
            seed: Determines cues and delays.
            num_cues: How many cues and actions there are.
            delay: Blank steps between cue and go signal, the same in all episodes; ``None`` draws them.
            min_delay: Least number of blank steps, each episode draws its own so that episodes drift apart.
            max_delay: Largest number of blank steps.
        """
        if delay is not None:
            min_delay = max_delay = delay
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be positive")
        if num_cues < 2:
            raise ValueError(f"recall: num_cues={num_cues} must be at least 2")
        if not 0 <= min_delay <= max_delay:
            raise ValueError(f"recall: min_delay={min_delay} and max_delay={max_delay} must satisfy 0 <= min <= max")
        self.spec = EnvSpec(
            env_id="recall",
            observation=VectorSpace(size=num_cues + 1, categorical=tuple(range(num_cues + 1))),
            actions=DiscreteActions(names=(tuple(f"cue_{cue}" for cue in range(num_cues)),)),
        )
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self._num_cues = num_cues
        self._delays = (min_delay, max_delay + 1)
        self._rng = np.random.default_rng(seed)
        self._cue = np.zeros(num_envs, dtype=np.int64)
        self._until_go = np.zeros(num_envs, dtype=np.int64)
        """Steps from the present observation to the go signal; -1 once the episode has ended."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, num_cues + 1]."""
        obs[:] = 0.0
        self._begin(np.arange(self.num_envs), obs)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` int64 [B] and fill ``rows``."""
        if action.min() < 0 or action.max() >= self._num_cues:
            raise ValueError(f"recall: actions from {action.min()} to {action.max()}, must be 0..{self._num_cues - 1}")
        answered = self._until_go == 0
        np.less(self._until_go, 0, out=rows.is_first)
        rows.reward[:] = answered & (action == self._cue)
        rows.terminated[:] = answered
        rows.truncated[:] = False
        self._until_go -= 1
        rows.obs[:] = 0.0
        rows.obs[:, self._num_cues] = self._until_go == 0
        if rows.is_first.any():
            self._begin(np.flatnonzero(rows.is_first), rows.obs)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``."""
        return {"cue": self._cue.copy(), "until_go": self._until_go.copy(), "random": to_plain(self._rng)}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``."""
        try:
            arrays = read_arrays(state, {"cue": self._cue, "until_go": self._until_go})
            cue, until_go = arrays["cue"], arrays["until_go"]
            if cue.min() < 0 or cue.max() >= self._num_cues or until_go.min() < -1 or until_go.max() > self._delays[1]:
                raise DoesNotFit("a cue or a delay is out of range")
            generator = read_generator(state.get("random"))
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        self._cue[:], self._until_go[:], self._rng = cue, until_go, generator
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def _begin(self, slots: np.ndarray, obs: np.ndarray) -> None:
        self._cue[slots] = self._rng.integers(self._num_cues, size=len(slots))
        self._until_go[slots] = self._rng.integers(*self._delays, size=len(slots)) + 1
        obs[slots, self._cue[slots]] = 1.0
