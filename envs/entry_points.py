"""Environments named by their class, ``module:Name``, or given by Python code as a class or function.

What is given and no import finds in another process (a class of a notebook, any function) is known here by its name, in
every process of the run: ``actors.user_code`` takes it there.
"""

from __future__ import annotations

import functools
import pkgutil
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: not every environment is one of gymnasium's
    from gymnasium.envs.registration import EnvSpec

given: dict[str, Callable[..., Any]] = {}
"""Classes and functions by environment id."""


def entry_point_spec(env_id: str) -> EnvSpec | None:
    """Gymnasium's spec of an environment that is named by what makes it; None if ``env_id`` names no such thing.

    By name alone only a ``gymnasium.Env`` class is taken. Names come from checkpoints, too, and calling any function
    that one names, with arguments that it chooses, would let it run anything.

    Raises:
        ImportError: there is no such module, or it cannot be imported.
    """
    from gymnasium.envs.registration import EnvSpec

    make = given.get(env_id) or _named_class(env_id)
    if make is None:
        return None
    # Gymnasium's ids allow fewer characters than Python's names: <lambda>.
    return EnvSpec(id=re.sub(r"[^\w:.-]", "_", env_id), entry_point=_checked(make, env_id))


def _named_class(env_id: str) -> Callable[..., Any] | None:
    if ":" not in env_id:
        return None
    try:
        found = pkgutil.resolve_name(env_id)
    except (AttributeError, ValueError):
        return None
    return found if is_environment_class(found) else None


def is_environment_class(found: Any) -> bool:
    """Whether this is a class of gymnasium's environments."""
    import gymnasium

    return isinstance(found, type) and issubclass(found, gymnasium.Env)


def _checked(make: Callable[..., Any], env_id: str) -> Callable[..., Any]:
    """``make`` as it is where it is a gymnasium class; else wrapped, to say what a function made that is none."""
    import gymnasium

    if is_environment_class(make):
        return make

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Any:
        env = make(*args, **kwargs)
        if not isinstance(env, gymnasium.Env):
            raise ValueError(
                f"{env_id}: expected a gymnasium.Env from {make!r}, got {type(env).__name__}; a PettingZoo game is "
                "named pettingzoo:module:function, a gymnasium.vector.VectorEnv is registered with gymnasium as a "
                "vector_entry_point"
            )
        return env

    return checked
