"""Adapt gymnasium's vector environments, in any of its three autoreset modes, to the rows of ``envs.boundary``.

- NEXT_STEP is the boundary's next-step form as it is.
- SAME_STEP is its same-step form; the final observations are in ``infos``.
- DISABLED becomes the same-step form: slots whose episode ended are reset here, in the same call.

Used by ``envs.gym`` and ``envs.native``. The mode is the one that the vector environment declares; rows that
contradict it are a fault, because rows in the wrong order would silently train the memory across episodes.
"""

from __future__ import annotations

import abc
import contextlib
from typing import Any, NoReturn

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from shoal.envs.boundary import EnvironmentFault, EnvSpec, StepRows
from shoal.envs.reports import Reports
from shoal.envs.writers import short

_MODES = {name: mode for mode in AutoresetMode for name in (mode, mode.value, mode.name, mode.name.lower())}


def mode_named(said: Any, whose: str) -> AutoresetMode:
    """Parse an autoreset mode: gymnasium's enumeration, its values, or ``next_step``, ``same_step``, ``disabled``.

    Raises:
        ValueError: it names no mode.
    """
    try:
        return _MODES[said]
    except (KeyError, TypeError):
        known = ", ".join(mode.name.lower() for mode in AutoresetMode)
        raise ValueError(f"{whose} is {short(said)}, must be one of {known}") from None


def declared_mode(vector: VectorEnv[Any, Any, Any], env_id: str) -> AutoresetMode:
    """Return the autoreset mode that a vector environment declares.

    Raises:
        ValueError: it declares no known mode.
    """
    metadata = vector.metadata or {}
    if "autoreset_mode" not in metadata:
        raise ValueError(
            f"{env_id}: {type(vector.unwrapped).__name__} does not declare how it resets; it must say so in "
            "metadata['autoreset_mode'], as a gymnasium.vector.AutoresetMode"
        )
    return mode_named(metadata["autoreset_mode"], f"{env_id}: metadata['autoreset_mode']")


class AutoresetRows(abc.ABC):
    """A vector environment's episodes in rows. Subclasses step, check and write, by implementing
    ``_call_reset``, ``_call_step``, ``_write`` and ``_write_final``.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, mode: AutoresetMode, first_slot: int = 0) -> None:
        """Prepare; ``first_slot``: the number that messages give to row 0."""
        self.spec = spec
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.reports = Reports()
        self.action_mask = np.ones((num_envs, spec.num_mask), dtype=np.uint8)
        self._surroundings: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        """Around every call of code of the environment in this process."""
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self._mode = mode
        self._first_slot = first_slot
        self._steps = 0
        self._ended = np.zeros(num_envs, dtype=bool)
        self._restarted = np.zeros(num_envs, dtype=bool)
        """Slots whose environment was replaced during the current call."""
        self.begins_anew = np.ones(num_envs, dtype=bool)
        self._after_reset = (
            np.zeros((num_envs, *spec.obs_shape), spec.obs_dtype) if mode is AutoresetMode.DISABLED else None
        )

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape].

        Raises:
            EnvironmentFault: the environment is unusable.
        """
        first, _ = self._call_reset(None)
        self._write(first, obs)
        self._ended.fill(False)
        self._restarted.fill(False)
        self.begins_anew.fill(True)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` [B, *action_shape] and fill ``rows``.

        Raises:
            EnvironmentFault: the environment is unusable, or its resets contradict the declared mode.
        """
        self._steps += 1
        self.begins_anew.fill(False)
        self._fill(rows, self._call_step(action))

    def _fill(self, rows: StepRows, answer: tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]) -> None:
        """Fill ``rows`` from the results of ``_call_step``."""
        obs, reward, terminated, truncated, infos = answer
        self._write(obs, rows.obs)
        np.copyto(rows.reward, reward, casting="same_kind")
        np.copyto(rows.terminated, terminated)
        np.copyto(rows.truncated, truncated)
        if self._mode is AutoresetMode.NEXT_STEP:
            self._check_masked(rows)
            np.copyto(rows.is_first, self._ended)
        np.logical_or(terminated, truncated, out=self._ended)
        any_ended = bool(self._ended.any())
        if self._mode is AutoresetMode.SAME_STEP:
            if any_ended:
                self._write_finals(infos, rows)
        elif any_ended and "final_obs" in infos:
            self._belie(int(np.argmax(self._ended)), "but delivered infos['final_obs'] as if it reset in the same step")
        if self._mode is AutoresetMode.DISABLED and any_ended:
            self._reset_ended(rows)
        if self.spec.same_step:
            np.copyto(rows.is_first, self._ended)
        np.logical_or(rows.is_first, self._restarted, out=rows.is_first)
        self._restarted.fill(False)
        np.greater(self.short_episode, rows.is_first, out=self.short_episode)  # short and not first

    def _check_masked(self, rows: StepRows) -> None:
        played = self._ended & ((rows.reward != 0) | rows.terminated | rows.truncated)
        if played.any():
            slot = int(np.argmax(played))
            self._belie(
                slot,
                f"but answered reward {rows.reward[slot]}, terminated {rows.terminated[slot]} and truncated "
                f"{rows.truncated[slot]} in the step after the end of an episode, which only resets",
            )

    def _write_finals(self, infos: dict[str, Any], rows: StepRows) -> None:
        assert rows.final_obs is not None
        final = infos.get("final_obs")
        delivered = np.asarray(infos.get("_final_obs", np.full(self.num_envs, final is not None)))
        if delivered.shape != (self.num_envs,):
            self._belie(int(np.argmax(self._ended)), f"but infos['_final_obs'] is {short(delivered)}")
        missing = self._ended & ~delivered.astype(bool)
        if isinstance(final, np.ndarray) and final.dtype == object:
            missing |= self._ended & np.array([one is None for one in final])
        if missing.any():
            self._belie(
                int(np.argmax(missing)),
                "but delivered no infos['final_obs'] for the episode that ended: a truncated episode is bootstrapped "
                "from it",
            )
        self._write_final(final, self._ended, rows.final_obs)

    def _reset_ended(self, rows: StepRows) -> None:
        assert rows.final_obs is not None
        assert self._after_reset is not None
        rows.final_obs[self._ended] = rows.obs[self._ended]
        # A new mask and new options each time: vector environments pop the mask from the options and may keep it.
        first, _ = self._call_reset({"reset_mask": self._ended.copy()})
        self._write(first, self._after_reset)
        changed = (self._after_reset != rows.obs).reshape(self.num_envs, -1).any(1) & ~self._ended
        if changed.any():
            self._belie(
                int(np.argmax(changed)),
                "but reset(options={'reset_mask': ...}) changed the observation of a slot that the mask leaves out",
            )
        np.copyto(rows.obs, self._after_reset)

    def _belie(self, slot: int, what: str) -> NoReturn:
        raise EnvironmentFault(
            f"{self.spec.env_id}: slot {self._first_slot + slot}, step {self._steps}: the environment declares "
            f"{self._mode}, {what}"
        )

    @abc.abstractmethod
    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        """Reset the vector environment and return (obs, infos)."""

    @abc.abstractmethod
    def _call_step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the vector environment and return (obs, reward [B], terminated [B], truncated [B], infos)."""

    @abc.abstractmethod
    def _write(self, obs: Any, out: np.ndarray) -> None:
        """Write its observations into ``out`` [B, *obs_shape]."""

    @abc.abstractmethod
    def _write_final(self, final: Any, ended: np.ndarray, out: np.ndarray) -> None:
        """Write the final observations of episodes that ended into their rows of ``out`` [B, *obs_shape]."""
