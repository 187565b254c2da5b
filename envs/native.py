"""Gymnasium environments that step all their slots at once: an id's own ``vector_entry_point``.

Made by ``envs.registry`` for ``vectorization="native"``. A single slot cannot be replaced,
so any fault ends the whole vector environment with a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from shoal.envs.actions import action_converter, choices
from shoal.envs.arguments import naming_bad_arguments, refuse_settings
from shoal.envs.autoreset import AutoresetRows, declared_mode
from shoal.envs.boundary import EnvironmentFault
from shoal.envs.config import AdapterOptions
from shoal.envs.env_state import get_state, set_state
from shoal.envs.guard import first_answer
from shoal.envs.gym import find_gym_spec
from shoal.envs.masks import KEY, remark_unused
from shoal.envs.plain_state import DoesNotFit, NotPlain, read_arrays
from shoal.envs.raised import raised
from shoal.envs.spaces import declared_by, make_spec
from shoal.envs.surroundings import Surroundings
from shoal.envs.trials import EPISODES_WITHOUT_KEY, KEY_MISSING, flags_told, missing
from shoal.envs.wrappers import Wrapping, find_wrappers
from shoal.envs.writers import Malformed, check_flags, check_rewards, make_writer, short

STATISTICS = "episode"
"""Key of infos under which gymnasium's vector wrapper RecordEpisodeStatistics tells of episodes that ended, beside
``final_info`` where a vector resets in the same step."""


class NativeEnvironment(AutoresetRows):
    """A gymnasium ``VectorEnv`` of any autoreset mode, which it must declare in its metadata."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        options: AdapterOptions | None = None,
        /,
        **kwargs: Any,
    ) -> None:
        """Make the environment.

        Args:
            env_id: ``Env-v0``, or ``package.module:Env-v0`` for an environment which that module registers.
            num_envs: Slots.
            seed: Determines everything random in an environment that keeps to its own generator.
            options: How the vector is wrapped and observations are read; None takes the defaults.
            **kwargs: Arguments for the vector environment.

        Raises:
            EnvironmentNotFound: the id is not registered, or its package is not installed.
            ValueError: the id has no vector environment, it does not take an argument, does not declare how it resets,
                or has a space that the policy has no encoder or head for.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be positive")
        self._seed: int | None = int(np.random.default_rng(seed).integers(1, 2**31))
        surroundings = Surroundings(env_id)
        with surroundings:
            wrappers = find_wrappers(options.wrappers if options else (), env_id, of_vectors=True)
            self._vector = _make_vector(env_id, num_envs, kwargs, wrappers)
        self._is_wrapped = bool(wrappers)
        try:
            mode = declared_mode(self._vector, env_id)
            space = self._vector.single_observation_space
            action = self._vector.single_action_space
            with surroundings:
                first = first_answer(self._vector, action, self._seed)
            declared = declared_by(env_id, self._vector, space, action, first and first[1])
            spec = make_spec(env_id, declared, options, same_step=mode is not AutoresetMode.NEXT_STEP)
        except BaseException:
            self._vector.close()
            raise
        super().__init__(spec, num_envs, mode)
        self._surroundings, self.reports = surroundings, surroundings.reports
        self._to_env = action_converter(declared.action)
        self._masks, self._looks_for_masks = declared.mask, declared.mask is None
        self._has_choices = bool(choices(action))
        self._write_batch = make_writer(declared.observation, spec, batched=True, reports=self.reports)
        self._write_one = make_writer(declared.observation, spec, batched=False, reports=self.reports)
        # Values are checked in this buffer and then copied: the caller's rows may be strided and cannot be flattened.
        self._checked = np.zeros((num_envs, *spec.obs_shape), spec.obs_dtype)
        self._flat = self._checked.reshape(num_envs, -1)
        self._first_answer = first
        self._watched: str | None = None
        self._trial_ended = np.zeros(num_envs, dtype=bool)
        """The last step of the slot's episode reported the watched key."""
        self._without_key = 0
        """Episodes until now, while no infos had the key; -1 afterwards."""

    def watch(self, key: str) -> None:
        """Look for ``key`` in infos, as in ``envs.boundary.TrialEnvironment``."""
        self._watched = key

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the environment's own ``set_options``: its later episodes begin without a call of ``reset``.

        Raises:
            EnvironmentFault: it has no such method.
        """
        take = getattr(self._vector.unwrapped, "set_options", None)
        if not callable(take):
            self._fail("cannot take options: it resets its slots itself and has no method set_options(options)")
        with self._surroundings:
            take(options)
        self._first_answer = None  # that of a reset without them

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``: that of all slots or none."""
        state: dict[str, Any] = {"ended": self._ended.copy(), "mask": self.action_mask.copy(), "steps": self._steps}
        if self._watched is not None:
            state["trial_ended"] = self._trial_ended.copy()
        with self._surroundings:
            try:
                return {**state, "env": get_state(self._vector), "why": ""}
            except NotPlain as error:
                return {**state, "env": None, "why": str(error)}

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: in all slots or none.

        Raises:
            EnvironmentFault: the environment refused its own state, and cannot be reset after that.
        """
        try:
            arrays = read_arrays(state, {"ended": self._ended, "mask": self.action_mask})
            trials = {} if self._watched is None else read_arrays(state, {"trial_ended": self._trial_ended})
            steps = state.get("steps")
            if state.get("env") is None or type(steps) is not int:
                raise DoesNotFit(str(state.get("why")))
            with self._surroundings:
                set_state(self._vector, state["env"])
        except DoesNotFit as error:
            self.reset(obs)
            return dict.fromkeys(range(self.num_envs), str(error))
        self._ended[:], self.action_mask[:], self._steps = arrays["ended"], arrays["mask"] != 0, steps
        self._trial_ended[:] = trials.get("trial_ended", False)
        return {}

    def close(self) -> None:
        """Close the environment."""
        with self._surroundings:
            self._vector.close()

    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        # Later episodes go on with the environment's own random stream.
        seed, self._seed = self._seed, None
        answer: Any
        answer, self._first_answer = self._first_answer, None
        # Vector environments take the mask out of the options.
        reset = None if options is None else options.get("reset_mask")
        try:
            if answer is None:
                with self._surroundings:
                    answer = self._vector.reset(seed=seed, options=options)
        except (Exception, SystemExit) as error:
            raise self._raised("reset", error) from error
        if not isinstance(answer, tuple) or len(answer) != 2:
            self._fail(f"reset answered {short(answer)}, must be (obs, infos)")
        self._keep_masks(*answer, reset)
        if self._watched is not None and isinstance(answer[1], dict):
            # A reset of all slots begins anew in any case.
            self._note_begins(self._ended, self._told(answer[1]))
        return answer

    def _call_step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        try:
            actions = self._to_env(action)
            with self._surroundings:
                answer: Any = self._vector.step(actions)
        except (Exception, SystemExit) as error:
            raise self._raised("step", error) from error
        if not isinstance(answer, tuple) or len(answer) != 5 or not isinstance(answer[4], dict):
            self._fail(f"step answered {short(answer)}, must be (obs, reward, terminated, truncated, infos)")
        obs, reward, terminated, truncated, infos = answer
        self._keep_masks(obs, infos)
        try:
            reward = check_rewards(reward, self.num_envs)
            terminated = check_flags(terminated, self.num_envs, "terminated")
            truncated = check_flags(truncated, self.num_envs, "truncated")
        except Malformed as error:
            self._fail(str(error), error.slot)
        if self._is_wrapped and self._mode is AutoresetMode.NEXT_STEP:
            # A wrapper of rewards changes the 0 of a step that only resets, too.
            reward = np.where(self._ended, reward.dtype.type(0), reward)
        if self._watched is not None:
            self._note_trials(terminated | truncated, infos)
        for slot in np.flatnonzero(terminated | truncated).tolist():
            of_end = infos.get("final_info", infos)
            if STATISTICS in infos and isinstance(of_end, dict):
                of_end = {**of_end, STATISTICS: infos[STATISTICS], f"_{STATISTICS}": infos.get(f"_{STATISTICS}")}
            self.reports.end_episode(slot, _info_of(of_end if isinstance(of_end, dict) else infos, slot))
        return obs, reward, terminated, truncated, infos

    def _write(self, obs: Any, out: np.ndarray) -> None:
        try:
            self._write_batch(self._unmasked(obs), self._flat)
        except Malformed as error:
            self._fail(str(error), error.slot)
        np.copyto(out, self._checked)

    def _write_final(self, final: Any, ended: np.ndarray, out: np.ndarray) -> None:
        slots = np.flatnonzero(ended)
        rows = self._flat[: len(slots)]
        slot: int | None = None
        try:
            if isinstance(final, np.ndarray) and final.dtype == object:
                for index, slot in enumerate(slots.tolist()):
                    self._write_one(self._unmasked(final[slot]), rows[index : index + 1])
            else:
                self._write_batch(_take(self._unmasked(final), ended), rows)
        except Malformed as error:
            if error.slot is not None and slot is None:
                slot = int(slots[error.slot])
            self._fail(f"final_obs: {error}", slot)
        out[ended] = self._checked[: len(slots)]

    def _note_trials(self, ended: np.ndarray, infos: dict[str, Any]) -> None:
        """Look for the watched key in the infos of a step: of slots that ``ended``, and of those that began an episode
        in it."""
        if self._mode is AutoresetMode.NEXT_STEP and self._ended.any():
            self._note_begins(self._ended, self._told(infos))
        if not ended.any():
            return
        if self._mode is AutoresetMode.SAME_STEP:
            final = infos.get("final_info")
            self._trial_ended |= ended & self._told(final if isinstance(final, dict) else {})
            self._note_begins(ended, self._told(infos))
        else:
            self._trial_ended |= ended & self._told(infos)
        if self._without_key >= 0:
            self._without_key += int(np.count_nonzero(ended))
            if self._without_key >= EPISODES_WITHOUT_KEY * self.num_envs:
                self.reports.remark(KEY_MISSING, 1, missing(f"{self.spec.env_id}: all slots", str(self._watched)))
                self._without_key = -1

    def _note_begins(self, slots: np.ndarray, told: np.ndarray) -> None:
        self.begins_anew[slots] = (told | self._trial_ended)[slots]
        self._trial_ended[slots] = False

    def _told(self, infos: dict[str, Any]) -> np.ndarray:
        """bool [B]: the slots whose infos report the watched key."""
        assert self._watched is not None
        try:
            told = flags_told(infos, self._watched, self.num_envs)
        except Malformed as error:
            self._fail(str(error), error.slot)
        if told is None:
            return np.zeros(self.num_envs, dtype=bool)
        self._without_key = -1
        return told

    def _unmasked(self, obs: Any) -> Any:
        """Observations without their masks, of one slot or of all."""
        return self._masks.split(obs, None)[0] if self._masks else obs

    def _keep_masks(self, obs: Any, infos: Any, slots: np.ndarray | None = None) -> None:
        """Write ``action_mask``, of the slots of a bool [B] only where a reset left the others as they were."""
        if self._masks is None:
            if self._looks_for_masks and remark_unused(infos, self._has_choices, self._where(None), self.reports):
                self._looks_for_masks = False
            return
        try:
            _, masks = self._masks.split(obs, infos)
            told = infos.get(f"_{KEY}") if self._masks.where == "info" and isinstance(infos, dict) else None
            if told is not None:
                told = check_flags(told, self.num_envs, f"infos['_{KEY}']")
            if slots is None:
                self._masks.write_batch(masks, told, self.action_mask)
            else:
                new = np.empty_like(self.action_mask)
                self._masks.write_batch(masks, slots if told is None else told & slots, new)
                self.action_mask[slots] = new[slots]
        except Malformed as error:
            self._fail(str(error), error.slot)

    def _fail(self, what: str, slot: int | None = None) -> NoReturn:
        raise EnvironmentFault(f"{self._where(slot)}: {what}")

    def _raised(self, during: str, error: BaseException) -> EnvironmentFault:
        return EnvironmentFault(f"{self._where(None)}: {during} raised {raised(error)}")

    def _where(self, slot: int | None) -> str:
        return f"{self.spec.env_id}: {'all slots' if slot is None else f'slot {slot}'}, step {self._steps}"


def _info_of(infos: dict[str, Any], slot: int) -> dict[str, Any]:
    """One slot's part of the infos of all, as gymnasium's vectors write them: arrays, each with a mask beside it."""
    found: dict[str, Any] = {}
    for key, values in infos.items():
        mask: Any = infos.get(f"_{key}")
        has_mask = np.ndim(mask) == 1 and len(mask) > slot
        if str(key).startswith("_") or (has_mask and not mask[slot]):
            continue
        if isinstance(values, dict):
            found[key] = _info_of(values, slot)
        elif isinstance(values, np.ndarray) and values.ndim and len(values) > slot:
            found[key] = values[slot]
    return found


def _take(batch: Any, mask: np.ndarray) -> Any:
    """The masked slots of an observation of all slots."""
    if isinstance(batch, dict):
        return {key: _take(part, mask) for key, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_take(part, mask) for part in batch)
    return np.asarray(batch)[mask]


def _make_vector(
    env_id: str, num_envs: int, kwargs: dict[str, Any], wrappers: Sequence[Wrapping]
) -> VectorEnv[Any, Any, Any]:
    spec = find_gym_spec(env_id)
    if spec.vector_entry_point is None:
        raise ValueError(
            f"{env_id}: env.vectorization=native needs an id that is registered with a vector_entry_point, this one "
            "has none; leave it out, or set it to async if the environment is slow"
        )
    if spec.additional_wrappers:
        raise ValueError(
            f"{env_id}: this id is registered with wrappers of single environments, which a native vector does not "
            "get; set env.vectorization=sync or async"
        )
    with naming_bad_arguments(env_id, kwargs):
        creator: Any = spec.vector_entry_point
        if isinstance(creator, str):
            creator = gymnasium.envs.registration.load_env_creator(creator)
        refuse_settings(env_id, kwargs, creator)
        if "num_envs" in kwargs:
            raise ValueError(
                f"{env_id}: env.kwargs.num_envs is the number of slots of a native vector: set env.num_envs"
            )
        limit = {} if spec.max_episode_steps is None else {"max_episode_steps": spec.max_episode_steps}
        # Not gymnasium.make_vec, which takes some of the arguments for its own.
        vector = creator(num_envs=num_envs, **{**limit, **spec.kwargs, **kwargs})
    if not isinstance(vector, VectorEnv):
        raise ValueError(
            f"{env_id}: env.vectorization=native makes {short(vector)}, must be a gymnasium.vector.VectorEnv; leave it "
            "out"
        )
    vector.unwrapped.spec = spec
    try:
        for wrap in wrappers:
            vector = wrap(vector)
    except BaseException:
        vector.close()
        raise
    if vector.num_envs != num_envs:
        vector.close()
        raise ValueError(f"{env_id}: env.num_envs={num_envs}, but its vector environment has {vector.num_envs} slots")
    return vector
