"""Wrappers of single environments, or of native vectors, found by name and given their arguments."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium
from gymnasium.vector import VectorEnv
from shoal import given
from shoal.envs.entry_points import is_maker, returned_class

_STATEFUL: Mapping[type, str] = {
    gymnasium.wrappers.NormalizeObservation: "policy.normalize_observations",
    gymnasium.wrappers.NormalizeReward: "learner.normalize_values",
    gymnasium.wrappers.vector.NormalizeObservation: "policy.normalize_observations",
    gymnasium.wrappers.vector.NormalizeReward: "learner.normalize_values",
}
"""Wrappers that learn statistics, and the settings that keep such statistics with the weights."""
_OF_ONE, _OF_VECTORS = "gymnasium.wrappers", "gymnasium.wrappers.vector"


@dataclasses.dataclass(frozen=True, slots=True)
class Wrapping:
    """One wrapper with its arguments; plain data that crosses to other processes."""

    wrap: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]
    of_vectors: bool

    def __call__(self, env: Any) -> Any:
        """Wrap ``env``.

        Raises:
            ValueError: the wrapper does not take the arguments, or does not fit the environment.
        """
        try:
            wrapped = self.wrap(env, **self.arguments)
            if isinstance(wrapped, VectorEnv) != self.of_vectors:
                raise ValueError(f"it returned {wrapped}")
            return wrapped
        except (TypeError, AssertionError, ValueError, gymnasium.error.Error) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            why = str(error) or type(error).__name__
            raise ValueError(f"env.wrappers: {self.name}({given}) cannot wrap {env}: {why}") from error


def find_wrappers(
    wrappers: Sequence[str | Mapping[str, Mapping[str, Any] | None]], env_id: str, *, of_vectors: bool = False
) -> tuple[Wrapping, ...]:
    """The wrappers of ``env.wrappers``, innermost first; imports their modules.

    Args:
        of_vectors: what they are to wrap is a ``gymnasium.vector.VectorEnv``, not one environment.

    Raises:
        ValueError: there is no such wrapper, it is for the other of the two, or it keeps statistics of its own.
    """
    return tuple(_find(*_parts(wrapper), env_id, of_vectors) for wrapper in wrappers)


def _parts(wrapper: str | Mapping[str, Mapping[str, Any] | None]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(wrapper, str):
        return wrapper, {}
    ((name, arguments),) = wrapper.items()
    return name, arguments or {}


def _find(name: str, arguments: Mapping[str, Any], env_id: str, of_vectors: bool) -> Wrapping:
    module, _, attribute = name.partition(":")
    try:
        wrapper = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{env_id}: env.wrappers: there is no wrapper {name!r}, written module:Class ({error})"
        ) from error
    except SystemExit as error:
        raise ValueError(f"{env_id}: env.wrappers: {module} {given.ends(error)}") from error
    if not callable(wrapper):
        raise ValueError(f"{env_id}: env.wrappers: {name!r} cannot be called")
    if not is_maker(wrapper):
        raise ValueError(
            f"{env_id}: env.wrappers: {name!r} is no wrapper: expected a class with reset and step, or a function that "
            "is annotated -> gymnasium.Env or lies in a module that imports gymnasium or pettingzoo"
        )
    for kind, setting in _STATEFUL.items():
        if isinstance(wrapper, type) and issubclass(wrapper, kind):
            raise ValueError(
                f"{env_id}: env.wrappers: {name} learns statistics in every slot for itself, which no checkpoint would "
                f"hold and no evaluation use; set {setting}=true, which keeps them with the weights"
            )
    made = wrapper if isinstance(wrapper, type) else returned_class(wrapper)
    if made is not None and issubclass(made, VectorEnv if not of_vectors else gymnasium.Env):
        raise ValueError(f"{env_id}: env.wrappers: {_other_kind(name, wrapper, of_vectors)}")
    return Wrapping(cast(Callable[..., Any], wrapper), name, dict(arguments), of_vectors)


def _other_kind(name: str, wrapper: Any, of_vectors: bool) -> str:
    """What is wrong with a wrapper of one environment for vectors, or the other way round, and what to do."""
    home, attribute = _OF_VECTORS if of_vectors else _OF_ONE, name.partition(":")[2]
    is_gymnasiums = str(getattr(wrapper, "__module__", "")).startswith(_OF_ONE)
    has_twin = is_gymnasiums and hasattr(importlib.import_module(home), attribute)
    if of_vectors:
        instead = f"name {home}:{attribute}" if has_twin else "name a gymnasium.vector.VectorWrapper"
        return (
            f"{name} wraps one environment, and env.vectorization=native makes a gymnasium.vector.VectorEnv of all "
            f"slots: {instead}, or set env.vectorization=sync or async, which wrap every slot by itself"
        )
    instead = f"name {home}:{attribute}" if has_twin else "name a gymnasium.Wrapper"
    return (
        f"{name} wraps a gymnasium.vector.VectorEnv, which only env.vectorization=native makes, and every environment "
        f"is wrapped by itself here: {instead}"
    )
