"""Any gymnasium environment behind the boundary, and a guard around each so that a broken one costs one slot.

Made by ``envs.registry``; the only module that imports gymnasium.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.boundary import (
    ContinuousActions,
    DiscreteActions,
    EnvironmentFault,
    EnvSpec,
    ImageSpace,
    StepRows,
    TokenSpace,
    VectorSpace,
)
from envs.config import EnvironmentNotFound

_FAULTS_IN_A_ROW = 3
"""So many faults without ``_HEALTHY_STEPS`` good steps between them, and the environment is given up."""
_HEALTHY_STEPS = 10
_REWARD_LIMIT = 1e9
"""A reward beyond it is a mistake: squared errors of its size leave float32 no digits for anything else."""
_BOUND_TOLERANCE = 1e-4
"""Relative; environments compute in float64 and clip in float32."""
_PACKAGES = {"ALE": "ale_py", "MiniGrid": "minigrid", "popgym": "popgym", "VizDoom": "vizdoom", "BabyAI": "minigrid"}
"""Gymnasium namespaces and the modules that register them."""

Writer = Callable[[Any, np.ndarray], None]
"""Checks one observation and writes it into a flat row."""


class _Malformed(Exception):
    """An answer that is not what the environment's spaces promise."""


class _Guard(gymnasium.Env[np.ndarray, Any]):
    """One environment that is replaced when it raises or answers nonsense; the replacement's first observation is the
    answer then, with reward 0 and ``restarted`` set.
    """

    def __init__(self, env_id: str, slot: int, seed: np.random.SeedSequence, make: Callable[[], Any]) -> None:
        self._env_id, self._slot, self._make = env_id, slot, make
        self._rng = np.random.default_rng(seed)
        self._env = make()
        self.metadata = dict(self._env.metadata)
        self.render_mode = None
        self.action_space = self._env.action_space
        self.space, self._write = _observation(self._env, env_id)
        shape, dtype = _row(self.space)
        bound: tuple[Any, Any] = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
        self.observation_space = spaces.Box(*bound, shape=shape, dtype=dtype)
        self._row = np.zeros(shape, dtype=dtype)
        self._flat = self._row.reshape(-1)
        self._seed = 0
        self._steps = 0
        self._healthy_steps = 0
        self._faults_in_a_row = 0
        self.restarted = False
        self.messages: list[str] = []

    @property
    def inner(self) -> Any:
        """The environment itself, without its wrappers."""
        return self._env.unwrapped

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The next episode; called by the vector environment alone, which never seeds."""
        is_very_first = self._seed == 0
        self._steps += not is_very_first
        try:
            # Later episodes go on with the environment's own random stream.
            self._reset_once(fresh_seed=is_very_first)
        except Exception as error:
            self._fault("reset", error)
            self._rebuild()
        return self._row, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The environment's answer, or the first observation of its replacement."""
        self._steps += 1
        try:
            answer = self._env.step(action)
            if not isinstance(answer, tuple) or len(answer) != 5:
                raise _Malformed(f"step answered {_short(answer)}, must be (obs, reward, terminated, truncated, info)")
            obs, reward, terminated, truncated, _ = answer
            self._write(obs, self._flat)
            if not _is_number(reward):
                raise _Malformed(f"reward {_short(reward)} is not a number")
            reward = float(reward)
            if not abs(reward) <= _REWARD_LIMIT:
                raise _Malformed(f"reward {reward} is not finite or beyond {_REWARD_LIMIT:g}")
            for name, flag in (("terminated", terminated), ("truncated", truncated)):
                if not isinstance(flag, (bool, np.bool_)):
                    raise _Malformed(f"{name} {_short(flag)} is not a bool")
        except Exception as error:
            self._fault(f"step with action {_short(action)}", error)
            self._rebuild()
            return self._row, 0.0, False, False, {}
        self._healthy_steps += 1
        return self._row, reward, bool(terminated), bool(truncated), {}

    def close(self) -> None:
        """Close the environment; what it raises then concerns nobody any more."""
        try:
            self._env.close()
        except Exception as error:
            self.messages.append(f"{self._where()}: close raised {type(error).__name__}: {error}")

    def _reset_once(self, *, fresh_seed: bool) -> None:
        if fresh_seed:
            self._seed = int(self._rng.integers(1, 2**31))
            answer = self._env.reset(seed=self._seed)
        else:
            answer = self._env.reset()
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise _Malformed(f"reset answered {_short(answer)}, must be (obs, info)")
        self._write(answer[0], self._flat)

    def _rebuild(self) -> None:
        self.restarted = True
        while True:
            self.close()
            try:
                self._env = self._make()
                self._reset_once(fresh_seed=True)
                return
            except Exception as error:
                self._fault("restart", error)

    def _fault(self, during: str, error: Exception) -> None:
        what = str(error) if isinstance(error, _Malformed) else f"{type(error).__name__}: {error}"
        message = f"{self._where()}, {during}: {what}"
        self._faults_in_a_row = 1 if self._healthy_steps >= _HEALTHY_STEPS else self._faults_in_a_row + 1
        self._healthy_steps = 0
        if self._faults_in_a_row >= _FAULTS_IN_A_ROW:
            raise EnvironmentFault(f"{message} ({self._faults_in_a_row} faults in a row, given up)") from error
        self.messages.append(message)

    def _where(self) -> str:
        return f"{self._env_id}: slot {self._slot}, step {self._steps} (seed {self._seed})"


class GymEnvironment:
    """``num_envs`` environments of one gymnasium id, stepped one after the other in this process."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seed: int | np.random.SeedSequence,
        *,
        wrappers: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Make the environments.

        Args:
            env_id: ``Env-v0``, or ``package.module:Env-v0`` for an environment which that module registers.
            num_envs: Slots.
            seed: Determines everything random in environments that keep to their own generators.
            wrappers: Names of gymnasium wrappers, innermost first, e.g. ``minigrid.wrappers:ImgObsWrapper``.
            **kwargs: Arguments for the environment.

        Raises:
            EnvironmentNotFound: the id is not registered, or its package is not installed.
            ValueError: a space is of a kind that the policy has no encoder or head for.
        """
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be positive")
        spec = _find(env_id)
        wrap = [_find_wrapper(name, env_id) for name in wrappers]

        def make() -> Any:
            # The checker wrapper warns once and changes nothing; the guard checks every step.
            env = gymnasium.make(spec, disable_env_checker=True, **kwargs)
            for wrapper in wrap:
                env = wrapper(env)
            return env

        sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        self._guards: list[_Guard] = []
        try:
            for slot, child in enumerate(sequence.spawn(num_envs)):
                self._guards.append(_Guard(env_id, slot, child, make))
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            raise EnvironmentNotFound(f"environment {env_id!r} needs a package: {error}") from error
        except TypeError as error:
            if not kwargs:
                raise
            raise ValueError(f"{env_id}: {error}") from error
        first = self._guards[0]
        self.spec = EnvSpec(env_id=env_id, observation=first.space, actions=_actions(first, env_id))
        self.num_envs = num_envs
        self.faults: list[str] = []
        self.short_episode = np.zeros(num_envs, dtype=bool)
        self._vector = SyncVectorEnv([functools.partial(_itself, guard) for guard in self._guards], copy=False)
        check_autoreset_mode(self._vector, env_id)
        self._to_env = _action_converter(first.action_space)
        self._ended = np.zeros(num_envs, dtype=bool)

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode in every slot and write the first observations into ``obs`` [B, *obs_shape]."""
        first, _ = self._vector.reset()
        np.copyto(obs, first)
        self._ended.fill(False)
        self._collect_messages()

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Apply ``action`` [B, *action_shape] and fill ``rows``."""
        obs, reward, terminated, truncated, _ = self._vector.step(self._to_env(action))
        np.copyto(rows.obs, obs)
        np.copyto(rows.is_first, self._ended)
        np.copyto(rows.reward, reward, casting="same_kind")
        np.copyto(rows.terminated, terminated)
        np.copyto(rows.truncated, truncated)
        np.logical_or(terminated, truncated, out=self._ended)
        self._collect_messages(rows.is_first)

    def close(self) -> None:
        """Close every environment."""
        self._vector.close()

    def _collect_messages(self, is_first: np.ndarray | None = None) -> None:
        for slot, guard in enumerate(self._guards):
            if guard.restarted:
                guard.restarted = False
                if is_first is not None:
                    is_first[slot] = True
            if guard.messages:
                self.faults += guard.messages
                guard.messages.clear()


def _itself(guard: _Guard) -> _Guard:
    return guard


def check_autoreset_mode(vector: gymnasium.vector.VectorEnv[Any, Any, Any], env_id: str) -> None:
    """Refuse a vector environment whose episodes do not end as the boundary's do."""
    mode = vector.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.NEXT_STEP:
        raise ValueError(f"{env_id}: autoreset mode {mode}, only {AutoresetMode.NEXT_STEP} is supported")


def _find(env_id: str) -> gymnasium.envs.registration.EnvSpec:
    """The registered spec of an id; imports its module."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(
            f"environment {env_id!r}: there is no module {error.name!r}; install the package that has it"
        ) from error
    except gymnasium.error.Error as error:
        close = difflib.get_close_matches(name, gymnasium.registry, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"({error})"
        package = _PACKAGES.get(name.partition("/")[0].partition("-")[0])
        if package and not module:
            hint = f"install {package.replace('_', '-')} and write {package}:{name}"
        elif not module:
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


def _observation(env: Any, env_id: str) -> tuple[TokenSpace | VectorSpace | ImageSpace, Writer]:
    """What the policy sees of an environment, and the function that writes it."""
    space = env.observation_space
    declared = env.metadata.get("token_space")
    is_bytes = isinstance(space, spaces.Box) and space.dtype == np.uint8
    if declared is not None:
        tokens = declared if isinstance(declared, TokenSpace) else TokenSpace(**declared)
        if not is_bytes or space.shape != (tokens.num_tokens, 3):
            raise ValueError(
                f"{env_id}: metadata['token_space'] says uint8 {(tokens.num_tokens, 3)}, observation space is {space}"
            )
        return tokens, _box_writer(space, "obs")
    if is_bytes and len(space.shape) == 3:
        return ImageSpace(height=space.shape[0], width=space.shape[1], channels=space.shape[2]), _box_writer(
            space, "obs"
        )
    writer, size = _flat_writer(space, "obs", env_id)

    def write(obs: Any, row: np.ndarray) -> None:
        writer(obs, row)
        if not np.isfinite(row).all():
            raise _Malformed(
                f"obs has a value that is not finite, {row[~np.isfinite(row)][0]}, at flat index "
                f"{int(np.flatnonzero(~np.isfinite(row))[0])}"
            )

    return VectorSpace(size=size), write


def _row(space: TokenSpace | VectorSpace | ImageSpace) -> tuple[tuple[int, ...], Any]:
    spec = EnvSpec(env_id="", observation=space, actions=DiscreteActions(names=()))
    return spec.obs_shape, spec.obs_dtype.type


def _flat_writer(space: spaces.Space[Any], field: str, env_id: str) -> tuple[Writer, int]:
    """Like ``gymnasium.spaces.flatten`` to float32, but checking, and into a row that exists."""
    if isinstance(space, spaces.Box):
        return _box_writer(space, field), int(np.prod(space.shape))
    if isinstance(space, spaces.Discrete):
        return _discrete_writer(int(space.n), int(space.start), field), int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return _multi_discrete_writer(space, field), int(space.nvec.sum())
    if isinstance(space, spaces.MultiBinary):
        bits = spaces.Box(0, 1, shape=space.shape, dtype=np.int8)
        return _box_writer(bits, field), int(np.prod(space.shape))
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        items = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        parts, start = [], 0
        for key, inner in items:
            writer, size = _flat_writer(inner, f"{field}[{key!r}]", env_id)
            parts.append((key, writer, slice(start, start + size)))
            start += size
        kind: type = Mapping if isinstance(space, spaces.Dict) else tuple
        return _parts_writer(parts, kind, field), start
    raise ValueError(
        f"{env_id}: {field} is a {type(space).__name__} space, which has no fixed size; supported: "
        "Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple"
    )


def _box_writer(space: spaces.Box, field: str) -> Writer:
    shape, dtype = space.shape, space.dtype
    low, high = space.low.reshape(-1).astype(np.float64), space.high.reshape(-1).astype(np.float64)
    low, high = low - _BOUND_TOLERANCE * (1 + np.abs(low)), high + _BOUND_TOLERANCE * (1 + np.abs(high))
    full_range = dtype == np.uint8 and bool((low <= 0).all() and (high >= 255).all())
    bounded = not full_range and bool((np.isfinite(low) | np.isfinite(high)).any())

    def write(obs: Any, row: np.ndarray) -> None:
        array = np.asarray(obs)
        if array.shape != shape:
            raise _Malformed(f"{field} has shape {array.shape}, must be {shape}")
        if array.dtype != dtype and not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise _Malformed(f"{field} has dtype {array.dtype}, must be {dtype}")
        flat = array.reshape(-1)
        # NaN is outside of nothing here; the whole row is checked for it at the end.
        if bounded and ((flat < low) | (flat > high)).any():
            index = int(np.flatnonzero((flat < low) | (flat > high))[0])
            raise _Malformed(
                f"{field} is out of its space at flat index {index}: {flat[index]} not in "
                f"[{space.low.reshape(-1)[index]}, {space.high.reshape(-1)[index]}]"
            )
        with np.errstate(over="ignore"):
            row[:] = flat

    return write


def _discrete_writer(count: int, start: int, field: str) -> Writer:
    def write(obs: Any, row: np.ndarray) -> None:
        try:
            index = operator.index(obs) - start
        except TypeError:
            raise _Malformed(f"{field} {_short(obs)} is not an integer") from None
        if not 0 <= index < count:
            raise _Malformed(f"{field} is {obs}, must be {start}..{start + count - 1}")
        row[:] = 0.0
        row[index] = 1.0

    return write


def _multi_discrete_writer(space: spaces.MultiDiscrete, field: str) -> Writer:
    counts, start = space.nvec.reshape(-1), space.start.reshape(-1)
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])

    def write(obs: Any, row: np.ndarray) -> None:
        array = np.asarray(obs)
        if array.shape != space.nvec.shape or array.dtype.kind not in "iu":
            raise _Malformed(f"{field} is {array.dtype} {array.shape}, must be integers {space.nvec.shape}")
        index = array.reshape(-1) - start
        if (index < 0).any() or (index >= counts).any():
            raise _Malformed(f"{field} {_short(obs)} is out of its space {space}")
        row[:] = 0.0
        row[offsets + index] = 1.0

    return write


def _parts_writer(parts: list[tuple[Any, Writer, slice]], kind: type, field: str) -> Writer:
    def write(obs: Any, row: np.ndarray) -> None:
        if not isinstance(obs, kind) or len(obs) != len(parts):  # type: ignore[arg-type]
            raise _Malformed(f"{field} {_short(obs)} must be a {kind.__name__} of {len(parts)}")
        for key, writer, where in parts:
            try:
                part = obs[key]  # type: ignore[index]
            except KeyError:
                raise _Malformed(f"{field} has no key {key!r}") from None
            writer(part, row[where])

    return write


def _actions(guard: _Guard, env_id: str) -> DiscreteActions | ContinuousActions:
    space = guard.action_space
    if isinstance(space, spaces.Discrete):
        return DiscreteActions(names=(_action_names(guard, int(space.n)),))
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        counts = [2] * int(np.prod(space.shape)) if isinstance(space, spaces.MultiBinary) else space.nvec.reshape(-1)
        names = tuple(tuple(f"action_{choice}_{i}" for i in range(count)) for choice, count in enumerate(counts))
        return DiscreteActions(names=names, scalar=False)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        low, high = space.low.reshape(-1), space.high.reshape(-1)
        return ContinuousActions(
            names=tuple(f"action_{index}" for index in range(len(low))),
            low=tuple(map(float, low)),
            high=tuple(map(float, high)),
        )
    raise ValueError(
        f"{env_id}: action space {space} is not supported; supported: "
        "Discrete, MultiDiscrete, MultiBinary, Box of floats"
    )


def _action_names(guard: _Guard, count: int) -> tuple[str, ...]:
    meanings = getattr(guard.inner, "get_action_meanings", None)
    if callable(meanings):
        names = tuple(str(name) for name in meanings())
        if len(names) == count == len(set(names)):
            return names
    return tuple(f"action_{index}" for index in range(count))


def _action_converter(space: spaces.Space[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """From the policy's rows to the batched action space."""
    if isinstance(space, spaces.Discrete):
        return lambda action: action + space.start
    if isinstance(space, spaces.MultiDiscrete):
        return lambda action: action.reshape(-1, *space.shape) + space.start
    if isinstance(space, spaces.MultiBinary):
        return lambda action: action.reshape(-1, *space.shape).astype(np.int8)
    assert isinstance(space, spaces.Box)
    return lambda action: np.clip(action.reshape(-1, *space.shape), space.low, space.high).astype(space.dtype)


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "iufb"
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}".replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."
