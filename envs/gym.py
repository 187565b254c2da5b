"""Any gymnasium environment behind the boundary: stepped in turn in this process, or each in its own.

Made by ``envs.registry``. ``envs.native`` is for environments that step all slots at once by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from shoal import given
from shoal.envs.actions import action_converter
from shoal.envs.arguments import naming_bad_arguments, refuse_settings
from shoal.envs.autoreset import AutoresetRows, mode_named
from shoal.envs.boundary import StepRows
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.entry_points import EntryPoint, entry_point_spec
from shoal.envs.envpool_vector import PREFIX as ENVPOOL
from shoal.envs.envpool_vector import envpool_spec
from shoal.envs.guard import ANEW, MASK, REPORTS, RESTARTED, Guard, first_answer, first_seed
from shoal.envs.masks import with_masks_of_method
from shoal.envs.plain_state import DoesNotFit, read_arrays
from shoal.envs.processes import GIVEN_UP, ProcessVectorEnv, Recipe, told_fault
from shoal.envs.spaces import declared_by, make_spec
from shoal.envs.surroundings import Surroundings
from shoal.envs.unknown_ids import why_unknown
from shoal.envs.wrappers import Wrapping, find_wrappers


class _GuardedRows(AutoresetRows):
    """Slots behind guards, in one of gymnasium's own vectors."""

    _vector: SyncVectorEnv[Any, Any] | ProcessVectorEnv | None = None
    _to_env: Callable[[np.ndarray], np.ndarray]

    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        assert self._vector is not None
        with self._surroundings:
            obs, infos = self._vector.reset(options=options)
        self._collect(infos)
        return obs, infos

    def _call_step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert self._vector is not None
        actions = self._to_env(action)
        with self._surroundings:
            answer = self._vector.step(actions)
        self._collect(answer[4])
        return answer

    def _write(self, obs: Any, out: np.ndarray) -> None:
        np.copyto(out, obs)

    def _write_final(self, final: Any, ended: np.ndarray, out: np.ndarray) -> None:
        for slot in np.flatnonzero(ended):
            out[slot] = final[slot]

    def _collect(self, infos: dict[str, Any]) -> None:
        """Collect the guards' reports on environments that were replaced or given up."""
        if RESTARTED in infos:
            for slot in np.flatnonzero(infos[f"_{RESTARTED}"]):
                self._report(infos[RESTARTED][slot])
                self._restarted[slot] = self.begins_anew[slot] = True
        if ANEW in infos:
            self.begins_anew |= infos[ANEW]
        if MASK in infos:
            told = infos[f"_{MASK}"]
            self.action_mask[told] = infos[MASK][told]
        if REPORTS in infos:
            for slot in np.flatnonzero(infos[f"_{REPORTS}"]):
                self.reports.add(infos[REPORTS][slot], self._first_slot + int(slot))
        if "final_info" in infos:
            # What the step said whose slot was reset in it.
            self._collect({key: value for key, value in infos["final_info"].items() if MASK not in key})
        if GIVEN_UP in infos:
            raise told_fault(*infos[GIVEN_UP][np.argmax(infos[f"_{GIVEN_UP}"])])

    def _report(self, messages: tuple[str, ...]) -> None:
        self.faults += messages


class GymEnvironment(_GuardedRows):
    """``num_envs`` environments of one gymnasium id, each behind a guard that replaces it when it fails."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        options: AdapterOptions | None = None,
        reseed_episodes: bool = False,
        /,
        **kwargs: Any,
    ) -> None:
        """Make the first environment and look at its spaces; ``reset`` makes the others and starts their processes.

        Args:
            env_id: ``Env-v0``, or ``package.module:Env-v0`` for an environment which that module registers.
            num_envs: Slots.
            seed: Determines everything random in environments that keep to their own generators.
            options: How slots are made, stepped and read; None takes the defaults.
            reseed_episodes: Give every episode a seed of its own, not only the first: evaluation plays so.
            **kwargs: Arguments for the environment.

        Raises:
            EnvironmentNotFound: the id is not registered, or its package is not installed.
            ValueError: an argument is wrong, or a space is of a kind that the policy has no encoder or head for.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be positive")
        options = options or AdapterOptions()
        mode = mode_named(options.autoreset_mode, f"{env_id}: autoreset_mode")
        num_groups = min(2 if options.slot_groups == "auto" else options.slot_groups, num_envs)
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        children = sequence.spawn(num_envs)
        surroundings = Surroundings(env_id)
        with surroundings, naming_bad_arguments(env_id, kwargs):
            make = make_maker(env_id, options, kwargs)
            env = make()
        try:
            with surroundings:
                first = first_answer(env, env.action_space, first_seed(children[0]))
                self._limit = _step_limit(env)
            declared = declared_by(env_id, env, env.observation_space, env.action_space, first and first[1])
            spec = make_spec(env_id, declared, options, same_step=mode is not AutoresetMode.NEXT_STEP)
        except BaseException:
            env.close()
            raise
        super().__init__(spec, num_envs, mode)
        self.reports = surroundings.reports
        self._to_env = action_converter(declared.action)
        self._watched: str | None = None
        self._cuts: list[int] | None = None
        self._options: dict[str, Any] | None = None
        recipes = [Recipe(spec, declared, slot, child, make, reseed_episodes) for slot, child in enumerate(children)]
        self.groups: tuple[_ProcessGroup, ...] = ()
        if options.vectorization == "async":
            with contextlib.suppress(Exception):
                env.close()
            self._make_vector: Callable[[], ProcessVectorEnv] = functools.partial(ProcessVectorEnv, recipes, mode)
            cuts = [num_envs * i // num_groups for i in range(num_groups + 1)]
            self._slices = list(itertools.starmap(slice, itertools.pairwise(cuts)))
        else:
            guards = [recipe.guard() for recipe in recipes]
            guards[0].adopt(env, first)
            self._surroundings = surroundings
            self._vector = SyncVectorEnv(
                [functools.partial(_itself, guard) for guard in guards], copy=False, autoreset_mode=mode
            )

    @property
    def step_limit(self) -> int:
        """Steps after which gymnasium's ``TimeLimit`` truncates an episode; 0 where there is no such wrapper."""
        return self._limit or 0

    def reset(self, obs: np.ndarray) -> None:
        """Reset all groups at once, as in ``AutoresetRows.reset``."""
        super().reset(obs)
        if isinstance(self._vector, ProcessVectorEnv):
            self.groups = tuple(_ProcessGroup(self, self._vector, slots) for slots in self._slices)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Step all groups, as in ``AutoresetRows.step``."""
        if not self.groups:
            super().step(action, rows)
            return
        for group in self.groups:
            group.step_begin(action[group.slots])
        for group in self.groups:
            group.step_end(rows.of(group.slots))

    def watch(self, key: str) -> None:
        """Look for ``key`` in infos, as in ``envs.boundary.TrialEnvironment``."""
        self._watched = key
        if self._vector is not None:
            self._vector.set_attr("watched_key", key)

    def stagger(self, seed: np.random.SeedSequence) -> None:
        """Truncate the first episodes at spread lengths, as in ``envs.boundary.StaggeredEnvironment``."""
        if self._limit is None:
            return
        phase = 1.0 - np.random.default_rng(seed).random()
        spread = (np.arange(self.num_envs) + phase) / self.num_envs
        lengths = np.maximum(1, np.rint(self._limit * spread)).astype(int)
        np.less(lengths, self._limit, out=self.short_episode)
        self._cuts = np.where(self.short_episode, lengths, 0).tolist()
        if self._vector is not None:
            self._vector.set_attr("steps_until_cut", self._cuts)

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later episodes, as in ``envs.boundary.OptionsEnvironment``."""
        self._options = options
        for group in self.groups:
            group.check_idle("set_options")
        if self._vector is not None:
            self._vector.set_attr("episode_options", options)

    def get_state(self) -> dict[str, Any]:
        """The state, as in ``envs.boundary.StatefulEnvironment``."""
        assert self._vector is not None
        with self._surroundings:
            slots = list(self._vector.call("get_state"))
        parts = self.groups or (self,)
        return {
            "slots": slots,
            "ended": np.concatenate([part._ended for part in parts]),
            "short_episode": self.short_episode.copy(),
            "steps": parts[0]._steps,
        }

    def set_state(self, state: Any, obs: np.ndarray) -> dict[int, str]:
        """Go on from a state, as in ``envs.boundary.StatefulEnvironment``: slot by slot."""
        try:
            flags = np.zeros(self.num_envs, dtype=bool)
            arrays = read_arrays(state, {"ended": flags, "short_episode": flags})
            ended = arrays["ended"]
            slots, steps = state.get("slots"), state.get("steps")
            if not isinstance(slots, list) or len(slots) != self.num_envs or type(steps) is not int:
                raise DoesNotFit(f"expected the states of {self.num_envs} slots")
        except DoesNotFit as error:
            return dict.fromkeys(range(self.num_envs), str(error))
        resets = ended & (self._mode is AutoresetMode.NEXT_STEP)
        with self._surroundings:
            if isinstance(self._vector, ProcessVectorEnv):
                answers = self._vector.set_states(slots, resets.tolist())
            else:
                assert isinstance(self._vector, SyncVectorEnv)
                guards = cast(list[Guard], self._vector.envs)
                answers = list(map(Guard.set_state, guards, slots, resets.tolist()))
        failed = {}
        for slot, (first, mask, why) in enumerate(answers):
            self.action_mask[slot] = mask
            if why:
                obs[slot], failed[slot], ended[slot] = first, why, False
            else:
                self.short_episode[slot] = arrays["short_episode"][slot]
        for part in self.groups or (self,):
            begin = part._first_slot
            part._ended[:], part._steps = ended[begin : begin + part.num_envs], steps
        return failed

    def first_environment(self) -> Any:
        """The current environment of slot 0, if it lives in this process."""
        assert isinstance(self._vector, SyncVectorEnv)
        return cast(Guard, self._vector.envs[0]).guarded

    def close(self) -> None:
        """Close every environment and end every process."""
        if self._vector is not None:
            with self._surroundings:
                self._vector.close()

    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if self._vector is None:
            # Created late, so that asking only for the spec starts no process.
            self._vector = self._make_vector()
            if self._watched is not None:
                self._vector.set_attr("watched_key", self._watched)
            if self._cuts is not None:
                self._vector.set_attr("steps_until_cut", self._cuts)
            if self._options is not None:
                self._vector.set_attr("episode_options", self._options)
        for group in self.groups:
            group.check_idle("reset")
        return super()._call_reset(options)


class _ProcessGroup(_GuardedRows):
    """Consecutive slots whose processes step while the other slots wait for their actions."""

    def __init__(self, env: GymEnvironment, vector: ProcessVectorEnv, slots: slice) -> None:
        super().__init__(env.spec, slots.stop - slots.start, env._mode, slots.start)
        self.slots = slots
        self._env, self._to_env = env, env._to_env
        self.reports = env.reports
        self.action_mask = env.action_mask[slots]
        self.begins_anew = env.begins_anew[slots]
        self.short_episode = env.short_episode[slots]
        self._vector: ProcessVectorEnv = vector.part(slots)

    def step_begin(self, action: np.ndarray) -> None:
        """Start the step, as in ``envs.boundary.SlotGroup``."""
        self._steps += 1
        self._vector.step_async(self._to_env(action))

    def step_end(self, rows: StepRows) -> None:
        """Wait for the step and fill ``rows``, as in ``envs.boundary.SlotGroup``."""
        answer = self._vector.step_wait()
        self.begins_anew.fill(False)
        self._collect(answer[4])
        self._fill(rows, answer)

    def check_idle(self, wanted: str) -> None:
        """Raise RuntimeError if a step is in progress, since its results would be mistaken for those of ``wanted``."""
        if self._vector.is_stepping:
            raise RuntimeError(f"{self.spec.env_id}: {wanted} while slots {self.slots} are stepped")

    def _report(self, messages: tuple[str, ...]) -> None:
        self._env.faults += messages


def _step_limit(env: Any) -> int | None:
    """The steps after which gymnasium's ``TimeLimit`` truncates; None where there is no such wrapper."""
    limits = []
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            limits.append(int(env._max_episode_steps))
        env = env.env
    return min(limits, default=None)


def _itself(guard: Guard) -> Guard:
    return guard


@dataclasses.dataclass(frozen=True, slots=True)
class _Maker:
    """Create one environment in the calling process."""

    module: str
    """The module that the id names; empty if it names none, or nothing that an import finds in another process."""
    spec: gymnasium.envs.registration.EnvSpec
    wrappers: tuple[Wrapping, ...]
    limit: Mapping[str, Any]
    """``max_episode_steps``, where it is given: the one argument that is gymnasium's and not the environment's."""

    def __call__(self) -> Any:
        # A new process lacks this one's registrations, and the environment may create others of its module by id.
        if self.module:
            importlib.import_module(self.module)
        # The checker wrapper warns once and changes nothing; the guard checks every step.
        env = gymnasium.make(self.spec, disable_env_checker=True, **self.limit)
        for wrap in self.wrappers:
            env = wrap(env)
        return with_masks_of_method(env)


def make_maker(env_id: str, options: AdapterOptions, kwargs: Mapping[str, Any]) -> _Maker:
    """The maker of one environment with its own arguments ``kwargs`` and the wrappers of ``options``."""
    spec = find_gym_spec(env_id)
    refuse_settings(env_id, kwargs, _constructor(spec))
    # Part of the spec instead of arguments of gymnasium.make, which has some of the same names.
    own = {name: value for name, value in kwargs.items() if name != "max_episode_steps"}
    limit = {name: value for name, value in kwargs.items() if name not in own}
    return _Maker(
        "" if env_id in given.environments else env_id.rpartition(":")[0],
        dataclasses.replace(spec, kwargs={**spec.kwargs, **own}),
        find_wrappers(options.wrappers, env_id),
        limit,
    )


def spec_to_make_again(
    env_id: str, options: AdapterOptions, kwargs: Mapping[str, Any]
) -> gymnasium.envs.registration.EnvSpec | None:
    """The spec by which gymnasium alone makes the environment again, also from a file; None where it cannot."""
    if options.vectorization == "native" or options.wrappers:
        return None
    maker = make_maker(env_id, options, kwargs)
    spec = dataclasses.replace(maker.spec, **maker.limit)
    try:
        spec.to_json()
    except (TypeError, ValueError):  # it is made by a class or function that has no name
        return None
    return spec


def _constructor(spec: gymnasium.envs.registration.EnvSpec) -> Callable[..., Any] | None:
    """What makes the environment, if it can be found; what hinders it is said when the environment is made."""
    if isinstance(spec.entry_point, EntryPoint):
        return spec.entry_point.make
    if callable(spec.entry_point):
        return spec.entry_point
    with contextlib.suppress(Exception):
        return gymnasium.envs.registration.load_env_creator(spec.entry_point or "")
    return None


def find_gym_spec(env_id: str) -> gymnasium.envs.registration.EnvSpec:
    """The registered spec of an id, or one of the class or function that it names; imports its module.

    Raises:
        EnvironmentNotFound: nothing has this name, or another library than the one named.
    """
    if env_id in given.environments and (spec := entry_point_spec(env_id)):
        return spec
    if env_id.startswith(ENVPOOL):
        return envpool_spec(env_id)
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(f"environment {env_id!r}: {given.no_module(error)}") from error
    try:
        spec = gymnasium.spec(name)
    except gymnasium.error.Error as error:
        if spec := entry_point_spec(env_id):
            return spec
        raise EnvironmentNotFound(f"environment {env_id!r} {why_unknown(module, name, error)}") from error
    if module and not module.startswith("gymnasium") and _is_gymnasiums_own(spec):
        raise EnvironmentNotFound(
            f"environment {env_id!r}: {module} does not register {name}, which would be gymnasium's own: write {name} "
            f"for that one; for one that {module} makes by a function, write a function of yours that returns it, "
            "annotated -> gymnasium.Env, and name that: my_module:function"
        )
    return spec


_REGISTERED_FIRST = frozenset(gymnasium.registry)


def _is_gymnasiums_own(spec: gymnasium.envs.registration.EnvSpec) -> bool:
    made_by = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    return spec.id in _REGISTERED_FIRST and str(made_by).startswith("gymnasium.")
