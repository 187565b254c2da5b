"""Environments in processes of their own, by gymnasium's ``AsyncVectorEnv``, for environments that are slow.

Made by ``envs.gym``. This module adds what gymnasium 1.4 lacks: a worker process that dies is named, and none is left
running. Calls that wait with a timeout are not used, because after a timeout the results arrive one step late.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState, _async_worker
from gymnasium.vector.utils import batch_space
from shoal.envs.boundary import EnvironmentFault, EnvSpec
from shoal.envs.guard import Guard, row_space
from shoal.envs.main_module import without_main_module
from shoal.envs.spaces import Declared
from shoal.envs.surroundings import Surroundings

GIVEN_UP = "given_up"
"""Key of ``info`` under which a worker reports that its environment was given up: (message, traceback)."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""Signals that ask a run to end (``deploy.training.interruption``), which may reach every process of it."""
_UNKNOWN = 255
"""Exit code that multiprocessing gives a process whose fork server has ended, whether or not the process has."""
_CLOSE_SECONDS = 5.0
"""Seconds after which a process that was asked to close is killed: an environment's ``close`` may hang."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """Recipe for one slot's environment, usable in any process."""

    spec: EnvSpec
    declared: Declared
    slot: int
    seed: np.random.SeedSequence
    make: Callable[[], Any]
    reseed_episodes: bool = False

    def guard(self, kind: type[Guard] = Guard) -> Guard:
        """Create the guard; its first reset creates the environment."""
        return kind(self.spec, self.declared, self.slot, self.seed, self.make, self.reseed_episodes)


class _Promise(gymnasium.Env[np.ndarray, Any]):
    """Stand-in with the spaces of an environment that lives in another process, for ``AsyncVectorEnv``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.metadata = {}
        self.action_space = recipe.declared.action
        self.observation_space = row_space(recipe.spec)


class _WorkerGuard(Guard):
    """A guard that reports a given-up environment in ``info``: gymnasium turns exceptions into warnings and text."""

    def __init__(self, spec: EnvSpec, *rest: Any) -> None:
        super().__init__(spec, *rest)
        self._surroundings = Surroundings(spec.env_id, self._reports)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset as in ``Guard``; an environment that is given up is reported in ``info``."""
        try:
            with self._surroundings:
                return super().reset(**kwargs)
        except EnvironmentFault as fault:
            return self._first, _given_up(fault)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step as in ``Guard``; an environment that is given up is reported in ``info``."""
        try:
            with self._surroundings:
                return super().step(action)
        except EnvironmentFault as fault:
            return self._first, 0.0, False, False, _given_up(fault)

    def set_state(self, state: Any, resets: bool) -> Any:
        """Go on as in ``Guard``; an environment that is given up is reported as in ``info``."""
        try:
            with self._surroundings:
                return super().set_state(state, resets)
        except EnvironmentFault as fault:
            return _given_up(fault)


def _given_up(fault: EnvironmentFault) -> dict[str, Any]:
    return {GIVEN_UP: (str(fault), traceback.format_exc())}


def told_fault(message: str, trace: str) -> EnvironmentFault:
    """The fault that a worker reported under ``GIVEN_UP``."""
    fault = EnvironmentFault(message)
    fault.add_note(f"In its process:\n{trace}")
    return fault


def _work(index: int, promise: Callable[[], _Promise], *rest: Any) -> None:
    """A worker process: the loop of gymnasium's, around a guard."""
    _outlast_signals()
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _async_worker(index, functools.partial(promise().recipe.guard, _WorkerGuard), *rest)


def _outlast_signals() -> None:
    """Stay until the parent closes this process or ends: a closed terminal, a scheduler or a service manager signals
    every process of a run, which still asks for the environments' states then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    passed_over = [number for number in STOPPING if number != signal.SIGINT]
    for number in passed_over:
        # Not ignored: a program that the environment starts would inherit that, and could not be terminated.
        signal.signal(number, _pass_over)
        signal.siginterrupt(number, False)

    def end_as_usual() -> None:
        for number in passed_over:
            if signal.getsignal(number) is _pass_over:
                signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=end_as_usual)


def _pass_over(number: int, frame: object) -> None:
    """Do nothing."""


def _end_with_parent() -> None:
    """End this process when its parent has died without a word, also if the environment hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


if TYPE_CHECKING:
    _AsyncVectorEnv = AsyncVectorEnv[np.ndarray, Any]
else:  # before gymnasium 1.3 it is no generic class
    _AsyncVectorEnv = AsyncVectorEnv


class ProcessVectorEnv(_AsyncVectorEnv):
    """One process per environment; closing it ends all of them, whatever their state."""

    _whole: ProcessVectorEnv | None = None
    """The whole vector that a part belongs to; None for the whole itself."""

    def __init__(self, recipes: list[Recipe], mode: AutoresetMode) -> None:
        """Start the processes.

        Raises:
            EnvironmentFault: one of them ended at once, or cannot be started.
        """
        self._env_id = recipes[0].spec.env_id
        self.processes, self.parent_pipes = [], []
        _start_tracker()
        context = _start_method()
        if context == "forkserver":
            # Imported once there, instead of once in every process.
            multiprocessing.set_forkserver_preload([__name__])
        try:
            with without_main_module():
                super().__init__(
                    [functools.partial(_Promise, recipe) for recipe in recipes],
                    # Without it an explicit reset is followed by a second one in the next step.
                    shared_memory=True,
                    copy=False,
                    context=context,
                    worker=cast(Any, _work),
                    autoreset_mode=mode,
                )
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset every environment, as in gymnasium.

        Raises:
            EnvironmentFault: a process ended; the others are ended too.
        """
        try:
            return super().reset(**kwargs)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    def step_async(self, actions: Any) -> None:
        """Start a step of every environment, as in gymnasium.

        Raises:
            EnvironmentFault: a process ended; the others are ended too.
        """
        try:
            super().step_async(actions)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    def step_wait(
        self, timeout: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the results of the step in progress, as in gymnasium.

        Raises:
            EnvironmentFault: a process ended; the others are ended too.
        """
        try:
            return super().step_wait(timeout)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    def set_states(self, states: Sequence[Any], resets: Sequence[bool]) -> list[tuple[np.ndarray, np.ndarray, str]]:
        """``Guard.set_state`` of every slot, with its own state; not while a step is in progress.

        Raises:
            EnvironmentFault: a process ended, and the others are ended too; or an environment was given up.
        """
        try:
            for pipe, *arguments in zip(self.parent_pipes, states, resets, strict=True):
                pipe.send(("_call", ("set_state", tuple(arguments), {})))
            results, successes = zip(*[pipe.recv() for pipe in self.parent_pipes], strict=True)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error
        self._raise_if_errors(successes)
        for result in results:
            if isinstance(result, dict):
                raise told_fault(*result[GIVEN_UP])
        return list(results)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every guard, as in gymnasium.

        Raises:
            EnvironmentFault: a process ended; the others are ended too.
        """
        try:
            return super().call(name, *args, **kwargs)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every guard, as in gymnasium.

        Raises:
            EnvironmentFault: a process ended; the others are ended too.
        """
        try:
            super().set_attr(name, values)
        except (EOFError, OSError) as error:
            raise self._name_the_dead(error) from error

    @property
    def is_stepping(self) -> bool:
        """True while a step is in progress, its results not yet received."""
        return self._state is AsyncState.WAITING_STEP

    def part(self, slots: slice) -> ProcessVectorEnv:
        """Return these slots as a vector of their own that uses the same processes.

        The whole and its parts must not step at the same time. If a process dies, all end. Only the whole is closed.
        """
        part = copy.copy(self)
        part._whole = self
        part.parent_pipes = self.parent_pipes[slots]
        part.num_envs = len(part.parent_pipes)
        part.observations = self.observations[slots]
        part.action_space = batch_space(self.single_action_space, part.num_envs)
        return part

    def close_extras(self, timeout: float | None = _CLOSE_SECONDS, terminate: bool = False) -> None:
        """Ask every process to close its environment, and kill those that have not ended after ``timeout`` seconds."""
        # Gymnasium puts None for the pipe of a worker that failed.
        pipes = [pipe for pipe in self.parent_pipes if pipe is not None]
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        deadline = time.monotonic() + (0.0 if terminate or timeout is None else timeout)
        for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            if pipe is not None and process.exitcode == _UNKNOWN:
                _read_to_end(pipe, deadline)
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
        if hasattr(self, "error_queue"):
            self.error_queue.close()

    def __del__(self) -> None:
        if self._whole is None:
            super().__del__()

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        # Workers that failed name themselves by their slots of the whole.
        whole = self._whole or self
        super(ProcessVectorEnv, whole)._raise_if_errors([*successes, *[True] * (whole.num_envs - self.num_envs)])

    def _name_the_dead(self, error: Exception) -> EnvironmentFault:
        """End the other processes and name the dead one and its exit: gymnasium only reports a broken pipe."""
        if self._whole is not None:
            return self._whole._name_the_dead(error)
        # The exit code may take a moment to appear.
        multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=_CLOSE_SECONDS)
        dead = [
            f"slot {slot}: its process {process.pid} {_ending(process.exitcode)}"
            for slot, process in enumerate(self.processes)
            if process.exitcode is not None
        ]
        self.close(terminate=True)
        what = "; ".join(dead) or f"its processes cannot be started or reached ({type(error).__name__}: {error})"
        return EnvironmentFault(f"{self._env_id}: {what}")


def _read_to_end(pipe: multiprocessing.connection.Connection, deadline: float) -> None:
    """Wait for the end of the process that has the pipe's other end."""
    with contextlib.suppress(EOFError, OSError):
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            pipe.recv()


def _start_tracker() -> None:
    """Start the process in which multiprocessing keeps account of semaphores, if there is none yet, out of reach of the
    signals to a whole process group: its successor would know none of them, and say so at length."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        multiprocessing.resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_method() -> str:
    """A copy of this process would hold the locks of its threads for ever: torch's, Ray's, numpy's."""
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by signal {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"
