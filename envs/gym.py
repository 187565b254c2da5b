"""Any gymnasium environment behind the boundary: stepped in turn in this process, or each in its own.

Made by ``envs.registry``. ``envs.native`` is for environments that step all slots at once by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from shoal.envs.autoreset import AutoresetRows, mode_named
from shoal.envs.boundary import EnvironmentFault, StepRows
from shoal.envs.config import EnvironmentNotFound
from shoal.envs.entry_points import entry_point_spec, given
from shoal.envs.guard import RESTARTED, Guard, naming_bad_arguments
from shoal.envs.processes import GIVEN_UP, ProcessVectorEnv, Recipe
from shoal.envs.spaces import action_converter, declared_by, make_spec

_PACKAGES = {"ALE": "ale_py", "MiniGrid": "minigrid", "popgym": "popgym", "VizDoom": "vizdoom", "BabyAI": "minigrid"}
"""Gymnasium namespaces and the modules that register them."""


class _GuardedRows(AutoresetRows):
    """Slots behind guards, in one of gymnasium's own vectors."""

    _vector: SyncVectorEnv[Any, Any] | ProcessVectorEnv | None = None
    _to_env: Callable[[np.ndarray], np.ndarray]

    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        assert self._vector is not None
        obs, infos = self._vector.reset(options=options)
        self._collect(infos)
        return obs, infos

    def _call_step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert self._vector is not None
        answer = self._vector.step(self._to_env(action))
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
                self._restarted[slot] = True
        if GIVEN_UP in infos:
            message, trace = infos[GIVEN_UP][np.argmax(infos[f"_{GIVEN_UP}"])]
            fault = EnvironmentFault(message)
            fault.add_note(f"In its process:\n{trace}")
            raise fault

    def _report(self, messages: tuple[str, ...]) -> None:
        self.faults += messages


class GymEnvironment(_GuardedRows):
    """``num_envs`` environments of one gymnasium id, each behind a guard that replaces it when it fails."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        vectorization: str = "sync",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        slot_groups: int | str = "auto",
        wrappers: Sequence[str] = (),
        reseed_episodes: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make the first environment and look at its spaces; ``reset`` makes the others and starts their processes.

        Args:
            env_id: ``Env-v0``, or ``package.module:Env-v0`` for an environment which that module registers.
            num_envs: Slots.
            seed: Determines everything random in environments that keep to their own generators.
            vectorization: ``sync``, one after the other in this process, or ``async``, each in a process of its own.
            autoreset_mode: How gymnasium's vector resets: ``next_step``, ``same_step`` or ``disabled``.
            slot_groups: In how many groups ``async`` slots are stepped, so that actors act for one meanwhile; ``auto``
                is 2. With fewer slots, one each.
            wrappers: Names of gymnasium wrappers, innermost first, e.g. ``minigrid.wrappers:ImgObsWrapper``.
            reseed_episodes: Give every episode a seed of its own, not only the first: evaluation plays so.
            **kwargs: Arguments for the environment.

        Raises:
            EnvironmentNotFound: the id is not registered, or its package is not installed.
            ValueError: an argument is wrong, or a space is of a kind that the policy has no encoder or head for.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be positive")
        if vectorization not in ("sync", "async"):
            raise ValueError(
                f"{env_id}: vectorization={vectorization!r} must be 'sync' (one environment after the other), 'async' "
                "(each in a process of its own) or 'native' (the environment's own vector_entry_point)"
            )
        mode = mode_named(autoreset_mode, f"{env_id}: autoreset_mode")
        num_groups = _group_number(slot_groups, vectorization, env_id)
        make = _Maker(
            _module_of(env_id), find_gym_spec(env_id), tuple(_find_wrapper(name, env_id) for name in wrappers), kwargs
        )
        with naming_bad_arguments(env_id, kwargs):
            env = make()
        try:
            declared = declared_by(env, env.observation_space, env.action_space)
            spec = make_spec(env_id, declared, same_step=mode is not AutoresetMode.NEXT_STEP)
        except BaseException:
            env.close()
            raise
        super().__init__(spec, num_envs, mode)
        self._to_env = action_converter(declared.action)
        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        recipes = [
            Recipe(spec, declared, slot, child, make, reseed_episodes)
            for slot, child in enumerate(sequence.spawn(num_envs))
        ]
        self.groups: tuple[_ProcessGroup, ...] = ()
        if vectorization == "async":
            with contextlib.suppress(Exception):
                env.close()
            self._make_vector: Callable[[], ProcessVectorEnv] = functools.partial(ProcessVectorEnv, recipes, mode)
            cuts = [num_envs * i // min(num_groups, num_envs) for i in range(min(num_groups, num_envs) + 1)]
            self._slices = list(itertools.starmap(slice, itertools.pairwise(cuts)))
        else:
            guards = [recipe.guard() for recipe in recipes]
            guards[0].adopt(env)
            self._vector = SyncVectorEnv(
                [functools.partial(_itself, guard) for guard in guards], copy=False, autoreset_mode=mode
            )

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

    def set_options(self, options: dict[str, Any]) -> None:
        """Pass options to the resets of later episodes, as in ``envs.boundary.OptionsEnvironment``."""
        assert self._vector is not None
        for group in self.groups:
            group.check_idle("set_options")
        self._vector.set_attr("episode_options", options)

    def first_environment(self) -> Any:
        """The current environment of slot 0, if it lives in this process."""
        assert isinstance(self._vector, SyncVectorEnv)
        return cast(Guard, self._vector.envs[0]).guarded

    def close(self) -> None:
        """Close every environment and end every process."""
        if self._vector is not None:
            self._vector.close()

    def _call_reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        if self._vector is None:
            # Created late, so that asking only for the spec starts no process.
            self._vector = self._make_vector()
        for group in self.groups:
            group.check_idle("reset")
        return super()._call_reset(options)


class _ProcessGroup(_GuardedRows):
    """Consecutive slots whose processes step while the other slots wait for their actions."""

    def __init__(self, env: GymEnvironment, vector: ProcessVectorEnv, slots: slice) -> None:
        super().__init__(env.spec, slots.stop - slots.start, env._mode, slots.start)
        self.slots = slots
        self._env, self._to_env = env, env._to_env
        self._vector: ProcessVectorEnv = vector.part(slots)

    def step_begin(self, action: np.ndarray) -> None:
        """Start the step, as in ``envs.boundary.SlotGroup``."""
        self._steps += 1
        self._vector.step_async(self._to_env(action))

    def step_end(self, rows: StepRows) -> None:
        """Wait for the step and fill ``rows``, as in ``envs.boundary.SlotGroup``."""
        answer = self._vector.step_wait()
        self._collect(answer[4])
        self._fill(rows, answer)

    def check_idle(self, wanted: str) -> None:
        """Raise RuntimeError if a step is in progress, since its results would be mistaken for those of ``wanted``."""
        if self._vector.is_stepping:
            raise RuntimeError(f"{self.spec.env_id}: {wanted} while slots {self.slots} are stepped")

    def _report(self, messages: tuple[str, ...]) -> None:
        self._env.faults += messages


def _group_number(said: int | str, vectorization: str, env_id: str) -> int:
    if said == "auto":
        return 2
    if isinstance(said, bool) or not isinstance(said, int) or said < 1:
        raise ValueError(f"{env_id}: slot_groups={said!r} must be at least 1, or 'auto'")
    if said > 1 and vectorization != "async":
        raise ValueError(
            f"{env_id}: slot_groups={said} is for vectorization='async': slots that are stepped in this process have "
            "nothing to overlap with"
        )
    return said


def _itself(guard: Guard) -> Guard:
    return guard


@dataclasses.dataclass(frozen=True, slots=True)
class _Maker:
    """Create one environment in the calling process."""

    module: str
    """The module that the id names; empty if it names none, or nothing that an import finds in another process."""
    spec: gymnasium.envs.registration.EnvSpec
    wrappers: tuple[Callable[[Any], Any], ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> Any:
        # A new process lacks this one's registrations, and the environment may create others of its module by id.
        if self.module:
            importlib.import_module(self.module)
        # The checker wrapper warns once and changes nothing; the guard checks every step.
        env = gymnasium.make(self.spec, disable_env_checker=True, **self.kwargs)
        for wrapper in self.wrappers:
            env = wrapper(env)
        return env


def _module_of(env_id: str) -> str:
    return "" if env_id in given else env_id.rpartition(":")[0]


def find_gym_spec(env_id: str) -> gymnasium.envs.registration.EnvSpec:
    """The registered spec of an id, or one of the class or function that it names; imports its module."""
    module, _, name = env_id.rpartition(":")
    try:
        if env_id in given and (spec := entry_point_spec(env_id)):
            return spec
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(
            f"environment {env_id!r}: there is no module {error.name!r}; install the package that has it"
        ) from error
    except gymnasium.error.Error as error:
        if spec := entry_point_spec(env_id):
            return spec
        if module == "__main__" or set("<(") & set(name):
            raise EnvironmentNotFound(
                f"environment {env_id!r} was defined in a script or notebook, and {name} is not defined in this one: "
                "define it here before or give it as env=..., or move it to a module of its own and name it "
                "package.module:Name"
            ) from error
        if module and hasattr(sys.modules.get(module), name):
            raise EnvironmentNotFound(
                f"environment {env_id!r} is no gymnasium.Env class: a function is registered with gymnasium, as "
                f"gymnasium.register('Name-v0', entry_point=...), or given from Python, as env={name}"
            ) from error
        close = difflib.get_close_matches(name, gymnasium.registry, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"({error})"
        package = _PACKAGES.get(name.partition("/")[0].partition("-")[0])
        if package and not module:
            hint = f"install {package.replace('_', '-')} and write {package}:{name}"
        elif module:
            hint = f"{module} neither registers nor defines it; {hint}"
        else:
            hint += " If a package registers it, write package.module:Env-v0 and install that package"
        raise EnvironmentNotFound(f"environment {env_id!r} is unknown: {hint}") from error


def _find_wrapper(name: str, env_id: str) -> Callable[[Any], Any]:
    module, _, attribute = name.partition(":")
    try:
        wrapper = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{env_id}: there is no wrapper {name!r}, written module:Class ({error})") from error
    if not callable(wrapper):
        raise ValueError(f"{env_id}: wrapper {name!r} cannot be called")
    return cast(Callable[[Any], Any], wrapper)
