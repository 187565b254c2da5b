"""A guard around each third-party environment, so that a failure costs one episode and not the run.

Used by every adapter that steps environments one by one. A guard passes only values that fit the spaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from shoal.envs.actions import choices
from shoal.envs.boundary import EnvironmentFault, EnvSpec
from shoal.envs.env_state import get_state, set_state
from shoal.envs.masks import remark_unused
from shoal.envs.plain_state import DoesNotFit, NotPlain, read_arrays, read_generator, to_plain
from shoal.envs.raised import raised
from shoal.envs.reports import Reports
from shoal.envs.spaces import Declared
from shoal.envs.surroundings import raise_if_abandoned
from shoal.envs.trials import TrialKey
from shoal.envs.writers import Malformed, check_flag, check_reward, make_writer, short

FAULTS_IN_A_ROW = 3
"""Number of faults without ``HEALTHY_STEPS`` good steps between them after which the environment is given up."""
HEALTHY_STEPS = 10

RESTARTED = "restarted"
"""Key of ``info`` under which a guard marks the first observation of a replacement: a tuple of messages."""


MASK = "mask"
"""Key of ``info`` under which a guard hands over the mask of legal actions, uint8 [num_mask]."""
REPORTS = "reports"
"""Key of ``info`` under which a guard hands over its ``Reports``."""
ANEW = "begins_anew"
"""Key of ``info`` under which a guard says True of a reset whose episode begins anew (``envs.trials``)."""


class Replaceable:
    """An environment that is replaced by a new one of the same kind when it fails.

    ``read`` functions parse its results and raise if they are malformed, which counts as a failure.
    """

    def __init__(
        self,
        env_id: str,
        place: str,
        seed: np.random.SeedSequence,
        make: Callable[[], Any],
        read_reset: Callable[[Any, Any], None],
        *,
        reseed_episodes: bool = False,
    ) -> None:
        """Prepare; the first ``reset`` makes the environment.

        Args:
            env_id: For messages.
            place: Which slots these are, for messages.
            seed: Determines the seeds of the environment and of its replacements.
            make: Makes an environment.
            read_reset: Takes what ``reset`` answered: an episode's first observation, and ``info``.
            reseed_episodes: Whether every episode has a seed of its own, so that episodes begin alike whatever was done
                in those before. Otherwise later ones go on with the environment's own random stream.
        """
        self._env_id, self._place, self._make, self._read_reset = env_id, place, make, read_reset
        self._reseed_episodes = reseed_episodes
        self._rng = np.random.default_rng(seed)
        self._seed = 0
        self._steps = 0
        self._healthy_steps = 0
        self._faults_in_a_row = 0
        self._messages: list[str] = []
        self.env: Any = None
        self.options: dict[str, Any] | None = None
        """Options for the resets of the episodes that begin from now on; None for none."""
        self._first_answer: Any = None
        """What the adopted environment answered to its first reset."""

    def adopt(self, env: Any, first_answer: Any = None) -> None:
        """Take an environment that was made to look at it, and its answer to ``reset(seed=first_seed(seed))``."""
        self.env, self._first_answer = env, first_answer

    def reset(self) -> bool:
        """Begin the next episode; return False if the environment had to be replaced.

        Raises:
            EnvironmentFault: too many faults in a row.
        """
        is_very_first = self._seed == 0
        self._steps += not is_very_first
        try:
            self._reset_once(fresh_seed=is_very_first or self._reseed_episodes)
        except (Exception, SystemExit) as error:
            self._fault("reset", error)
            self._replace()
            return False
        return True

    def step(self, action: Any, read: Callable[[Any, Any, Any, Any, Any], None]) -> bool:
        """Step once and ``read`` (obs, reward, terminated, truncated, info); return False if the environment was
        replaced, and ``read`` the replacement's first observation instead.

        Raises:
            EnvironmentFault: too many faults in a row.
        """
        self._steps += 1
        try:
            answer = self.env.step(action)
            if not isinstance(answer, tuple) or len(answer) != 5:
                raise Malformed(f"step answered {short(answer)}, must be (obs, reward, terminated, truncated, info)")
            read(*answer)
        except (Exception, SystemExit) as error:
            self._fault(f"step with action {short(action)}", error)
            self._replace()
            return False
        self._healthy_steps += 1
        return True

    def get_state(self) -> dict[str, Any]:
        """Its state as plain data; where the environment's cannot be told, ``env`` is None and ``why`` says so."""
        counts = (self._seed, self._steps, self._healthy_steps, self._faults_in_a_row)
        state: dict[str, Any] = {"random": to_plain(self._rng), "counts": list(counts)}
        try:
            return {**state, "env": get_state(self.env), "why": ""}
        except NotPlain as error:
            return {**state, "env": None, "why": str(error)}

    def set_state(self, state: Any) -> None:
        """Go on from ``get_state``; this one was just reset.

        Raises:
            DoesNotFit: the environment's state was not told, or it is damaged; ``restart`` is to follow.
        """
        if not isinstance(state, dict):
            raise DoesNotFit("its state is missing")
        generator, counts = read_generator(state.get("random")), state.get("counts")
        if not isinstance(counts, list) or [type(count) for count in counts] != [int] * 4:
            raise DoesNotFit("its counts are damaged")
        # First of all, so that a restart has a seed that none had before.
        self._rng = generator
        self._seed, self._steps, self._healthy_steps, self._faults_in_a_row = counts
        if state.get("env") is None:
            raise DoesNotFit(str(state.get("why")))
        set_state(self.env, state["env"])

    def restart(self) -> None:
        """Begin an episode in a new environment, with a seed of its own and no faults before.

        Raises:
            EnvironmentFault: too many faults in a row.
        """
        self._healthy_steps = self._faults_in_a_row = 0
        self._replace()

    def take_messages(self) -> tuple[str, ...]:
        """Return the messages of faults since the last call."""
        messages = tuple(self._messages)
        self._messages.clear()
        return messages

    def close(self) -> None:
        """Close the environment; an exception becomes a message."""
        env, self.env, self._first_answer = self.env, None, None
        try:
            if env is not None:
                env.close()
        except (Exception, SystemExit) as error:
            self._messages.append(f"{self._where()}: close raised {raised(error)}")

    def _reset_once(self, *, fresh_seed: bool) -> None:
        if self.env is None:
            raise_if_abandoned()
            self.env = self._make()
        if fresh_seed:
            self._seed = _draw(self._rng)
        answer, self._first_answer = self._first_answer, None
        if answer is None or self.options is not None:
            seed = {"seed": self._seed} if fresh_seed else {}
            answer = self.env.reset(**seed, **self._options())
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise Malformed(f"reset answered {short(answer)}, must be (obs, info)")
        self._read_reset(*answer)

    def _options(self) -> dict[str, Any]:
        # A copy: environments take entries out of what they are given.
        return {} if self.options is None else {"options": dict(self.options)}

    def _replace(self) -> None:
        while True:
            self.close()
            try:
                self._reset_once(fresh_seed=True)
                return
            except (Exception, SystemExit) as error:
                self._fault("restart", error)

    def _fault(self, during: str, error: BaseException) -> None:
        what = str(error) if isinstance(error, Malformed) else raised(error)
        message = f"{self._where()}, {during}: {what}"
        self._faults_in_a_row = 1 if self._healthy_steps >= HEALTHY_STEPS else self._faults_in_a_row + 1
        self._healthy_steps = 0
        if self._faults_in_a_row >= FAULTS_IN_A_ROW:
            raise EnvironmentFault(f"{message} ({self._faults_in_a_row} faults in a row, given up)") from error
        self._messages.append(message)

    def _where(self) -> str:
        return f"{self._env_id}: {self._place}, step {self._steps} (seed {self._seed})"


def first_seed(seed: np.random.SeedSequence) -> int:
    """The seed that a ``Replaceable`` made with ``seed`` resets its first environment with."""
    return _draw(np.random.default_rng(seed))


def _draw(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 2**31))


def first_answer(env: Any, action: Any, seed: int) -> Any:
    """What ``env`` answers to its first reset, whose ``info`` tells whether there are masks of legal actions.

    None for actions that have no masks, and where the reset fails: what hinders it is said when an episode begins.
    """
    if not choices(action):
        return None
    with contextlib.suppress(Exception, SystemExit):
        answer = env.reset(seed=seed)
        return answer if isinstance(answer, tuple) and len(answer) == 2 else None
    return None


class Guard(gymnasium.Env[np.ndarray, Any]):
    """One environment for gymnasium's own vectors; replaced when it fails, its replacement's first observation is the
    answer then, with reward 0, no flag, and messages in ``info``.
    """

    def __init__(
        self,
        spec: EnvSpec,
        declared: Declared,
        slot: int,
        seed: np.random.SeedSequence,
        make: Callable[[], Any],
        reseed_episodes: bool = False,
    ) -> None:
        self.metadata = {}
        self.render_mode = None
        self.action_space = declared.action
        self.observation_space = row_space(spec)
        self._reports = Reports()
        self._write = make_writer(declared.observation, spec, batched=False, reports=self._reports)
        # A vector that resets in the step in which an episode ends still refers to the final observation after it.
        self._first = np.zeros(spec.obs_shape, dtype=spec.obs_dtype)
        self._next = np.zeros_like(self._first)
        self._first_flat, self._next_flat = self._first.reshape(1, -1), self._next.reshape(1, -1)
        self._outcome = (0.0, False, False)
        self._masks = declared.mask
        self._mask = np.ones(spec.num_mask, dtype=np.uint8)
        self._where = f"{spec.env_id}: slot {slot}"
        self._trials: TrialKey | None = None
        self._begins_anew = False
        self._looks_for_masks = declared.mask is None
        self._has_choices = bool(choices(declared.action))
        self.steps_until_cut = 0
        """After so many steps the episode is truncated, if it has not ended by then; 0: it is not. Set by name, too, by
        the process that steps this one."""
        self._inner = Replaceable(
            spec.env_id, f"slot {slot}", seed, make, self._read_reset, reseed_episodes=reseed_episodes
        )

    def adopt(self, env: Any, first_answer: Any = None) -> None:
        """Guard an existing environment, as in ``Replaceable``."""
        self._inner.adopt(env, first_answer)

    @property
    def episode_options(self) -> dict[str, Any] | None:
        """Options for the environment's resets; also set by name from the process that steps this one."""
        return self._inner.options

    @episode_options.setter
    def episode_options(self, options: dict[str, Any] | None) -> None:
        self._inner.options = options

    @property
    def watched_key(self) -> str | None:
        """Key of infos by which episodes begin anew; also set by name from the process that steps this one."""
        return self._trials.key if self._trials else None

    @watched_key.setter
    def watched_key(self, key: str) -> None:
        self._trials = TrialKey(key, self._where, self._reports)

    @property
    def guarded(self) -> Any:
        """The current environment."""
        return self._inner.env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin the next episode; only the vector environment calls this, and it never seeds."""
        is_sound = self._inner.reset()
        return self._first, self._info() if is_sound else self._restarted()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Return the environment's result, or the first observation of its replacement."""
        if not self._inner.step(action, self._read_step):
            self.steps_until_cut = 0
            return self._first, 0.0, False, False, self._restarted()
        return self._next, *self._outcome, self._info()

    def get_state(self) -> dict[str, Any]:
        """Its state as plain data (``Replaceable.get_state``)."""
        state = {**self._inner.get_state(), "mask": self._mask.copy(), "steps_until_cut": self.steps_until_cut}
        if self._trials:
            state["trial_ended"] = np.array(self._trials.was_told)
        return state

    def set_state(self, state: Any, resets: bool) -> tuple[np.ndarray, np.ndarray, str]:
        """Go on from ``get_state``; with ``resets`` the next step begins an episode whatever the action, as
        gymnasium's NEXT_STEP does after an end.

        Return the first observation of a new environment, its mask of legal actions, and why there had to be one; where
        it went on, the mask is that of then and the reason is empty.
        """
        try:
            mask = read_arrays(state, {"mask": self._mask})["mask"]
            cut = state.get("steps_until_cut")
            if type(cut) is not int or cut < 0:
                raise DoesNotFit("its steps_until_cut are damaged")
            if self._trials:
                told = read_arrays(state, {"trial_ended": np.array(False)})["trial_ended"]
                self._trials.was_told = bool(told)
            self._inner.set_state(state)
        except DoesNotFit as error:
            self._inner.restart()
            return self._first, self._mask, "; ".join((str(error), *self._inner.take_messages()))
        self._mask[:], self.steps_until_cut = mask != 0, cut
        if resets:
            # On this object alone and once: no later step looks whether it has to reset.
            vars(self)["step"] = self._reset_instead
        return self._first, self._mask, ""

    def _reset_instead(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        del vars(self)["step"]
        obs, info = self.reset()
        return obs, 0.0, False, False, info

    def close(self) -> None:
        """Close the environment."""
        self._inner.close()

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {REPORTS: self._reports.take()} if self._reports else {}
        if self._masks:
            info[MASK] = self._mask
        if self._begins_anew:
            info[ANEW], self._begins_anew = True, False
        return info

    def _restarted(self) -> dict[str, Any]:
        return {RESTARTED: self._inner.take_messages(), **self._info()}

    def _read_reset(self, obs: Any, info: Any) -> None:
        self._write(self._unmask(obs, info), self._first_flat)
        if self._trials:
            self._begins_anew = self._trials.begin(info)

    def _unmask(self, obs: Any, info: Any) -> Any:
        """The observation itself; the mask of legal actions is kept."""
        if self._masks:
            obs, mask = self._masks.split(obs, info)
            self._masks.write(mask, self._mask)
        elif self._looks_for_masks and remark_unused(info, self._has_choices, self._where, self._reports):
            self._looks_for_masks = False
        return obs

    def _read_step(self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> None:
        self._write(self._unmask(obs, info), self._next_flat)
        self._outcome = (
            check_reward(reward),
            check_flag(terminated, "terminated"),
            check_flag(truncated, "truncated"),
        )
        is_short = self.steps_until_cut > 0
        if self.steps_until_cut == 1 and not (self._outcome[1] or self._outcome[2]):
            self._outcome = (self._outcome[0], False, True)
        if self._outcome[1] or self._outcome[2]:
            self.steps_until_cut = 0
            if not is_short:  # otherwise those that end soon would be reported and the others would not
                self._reports.end_episode(0, info)
            if self._trials:
                self._trials.end(info)
        elif self.steps_until_cut:
            self.steps_until_cut -= 1


def row_space(spec: EnvSpec) -> spaces.Box:
    """A guard's observation in the form of ``envs.boundary``'s rows."""
    bound: tuple[Any, Any] = (0, 255) if spec.obs_dtype == np.uint8 else (-np.inf, np.inf)
    return spaces.Box(*bound, shape=spec.obs_shape, dtype=spec.obs_dtype.type)
