"""Wrappers of single environments, found by name and given their arguments."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium
from shoal.envs.entry_points import is_maker

_STATEFUL: Mapping[type, str] = {
    gymnasium.wrappers.NormalizeObservation: "policy.normalize_observations",
    gymnasium.wrappers.NormalizeReward: "learner.normalize_values",
}
"""Wrappers that learn statistics, and the settings that keep such statistics with the weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wrapping:
    """One wrapper with its arguments; plain data that crosses to other processes."""

    wrap: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]

    def __call__(self, env: Any) -> Any:
        """Wrap ``env``.

        Raises:
            ValueError: the wrapper does not take the arguments, or does not fit the environment.
        """
        try:
            return self.wrap(env, **self.arguments)
        except (TypeError, AssertionError, ValueError, gymnasium.error.Error) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            why = str(error) or type(error).__name__
            raise ValueError(f"env.wrappers: {self.name}({given}) cannot wrap {env}: {why}") from error


def find_wrappers(
    wrappers: Sequence[str | Mapping[str, Mapping[str, Any] | None]], env_id: str
) -> tuple[Wrapping, ...]:
    """The wrappers of ``env.wrappers``, innermost first; imports their modules.

    Raises:
        ValueError: there is no such wrapper, or it keeps statistics of its own.
    """
    return tuple(_find(*_parts(wrapper), env_id) for wrapper in wrappers)


def _parts(wrapper: str | Mapping[str, Mapping[str, Any] | None]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(wrapper, str):
        return wrapper, {}
    ((name, arguments),) = wrapper.items()
    return name, arguments or {}


def _find(name: str, arguments: Mapping[str, Any], env_id: str) -> Wrapping:
    module, _, attribute = name.partition(":")
    try:
        wrapper = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{env_id}: env.wrappers: there is no wrapper {name!r}, written module:Class ({error})"
        ) from error
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
    return Wrapping(cast(Callable[..., Any], wrapper), name, dict(arguments))
