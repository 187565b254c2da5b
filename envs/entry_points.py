"""Environments named by what makes them, ``module:Name``, or given by Python code as a class or function.

What is given and no import finds in another process (a class of a notebook, any function) is known here by its name, in
every process of the run: ``actors.user_code`` takes it there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shoal import given
from shoal.envs.config import EnvironmentNotFound

if TYPE_CHECKING:  # imported where it is used: not every environment is one of gymnasium's
    from gymnasium.envs.registration import EnvSpec


def entry_point_spec(env_id: str) -> EnvSpec | None:
    """Gymnasium's spec of an environment that is named by what makes it; None if ``env_id`` names no such thing.

    By name alone only classes with ``reset`` and ``step`` are taken, and functions whose annotation says that they
    return such a class. Names come from checkpoints, too, and calling any function that one names, with arguments that
    it chooses, would let it run anything.

    Raises:
        ImportError: there is no such module, or it cannot be imported.
    """
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    make = given.environments.get(env_id) or _named(env_id)
    if make is None:
        return None
    is_gymnasiums = isinstance(make, type) and issubclass(make, gymnasium.Env)
    # Gymnasium's ids allow fewer characters than Python's names: <lambda>.
    return EnvSpec(
        id=re.sub(r"[^\w:.-]", "_", env_id),
        entry_point=make if is_gymnasiums else EntryPoint(env_id, make),
        vector_entry_point=make,
    )


def _named(env_id: str) -> Callable[..., Any] | None:
    if ":" not in env_id:
        return None
    try:
        found = pkgutil.resolve_name(env_id)
    except (AttributeError, ValueError):
        return None
    return found if makes_environment(found) else None


_LIBRARIES = frozenset({"gymnasium", "gym", "pettingzoo", "supersuit", "shimmy", "mettagrid"})


def is_maker(found: Any) -> bool:
    """Whether a wrapper or a factory of games may be called because something names it.

    As for environments, names come from checkpoints, too. Classes with ``reset`` and ``step`` are taken, functions
    whose annotation says that they return such a class, and functions of modules that use an environment library;
    nothing else, so that a name cannot run any function with any arguments.
    """
    if makes_environment(found):
        return True
    if not inspect.isfunction(found):
        return False
    values = [found, *found.__globals__.values()]
    homes = (getattr(value, "__name__" if inspect.ismodule(value) else "__module__", None) for value in values)
    return any(str(home).partition(".")[0] in _LIBRARIES for home in homes)


def find_maker(env_id: str, name: str, form: str, expected: str) -> Callable[..., Any]:
    """What makes the games of ``env_id``, which names it as ``name`` (``package.module:attribute``).

    ``form`` is how such an id is written, and ``expected`` what may make a game, for messages.

    Raises:
        EnvironmentNotFound: there is nothing of this name.
        ValueError: it makes no games.
    """
    from shoal.envs.writers import short

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise EnvironmentNotFound(f"environment {env_id!r}: write {form}")
    try:
        importlib.import_module(module)
        found = pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        raise EnvironmentNotFound(f"environment {env_id!r}: {given.no_module(error)}") from error
    except AttributeError as error:
        raise EnvironmentNotFound(f"environment {env_id!r}: {error}; write {form}") from error
    if not callable(found):
        raise ValueError(f"{env_id}: {attribute} is {short(found)}; write {form}")
    if not is_maker(found):
        raise ValueError(f"{env_id}: {attribute} makes no game: expected {expected}")
    maker: Callable[..., Any] = found
    return maker


def is_environment_class(found: Any) -> bool:
    """Whether this is a class of environments, of gymnasium's or with an interface like it."""
    return isinstance(found, type) and all(callable(getattr(found, name, None)) for name in ("reset", "step"))


def makes_environment(found: Any) -> bool:
    """Whether this is such a class, or a function whose annotation says that it returns one."""
    return is_environment_class(found) or is_environment_class(returned_class(found))


def returned_class(found: Any) -> type | None:
    """The class that a function's annotation says it returns; None where it says none."""
    if isinstance(found, type) or not callable(found):
        return None
    try:
        returned = typing.get_type_hints(found).get("return")
    except Exception:  # noqa: BLE001  (an annotation is any expression of another module)
        return None
    made = typing.get_origin(returned) or returned
    return made if isinstance(made, type) else None


@dataclasses.dataclass(frozen=True, slots=True)
class EntryPoint:
    """Makes one environment by a function, or by a class that knows nothing of gymnasium."""

    env_id: str
    make: Callable[..., Any]

    def __call__(self, **kwargs: Any) -> Any:
        """Return a ``gymnasium.Env``.

        Raises:
            ValueError: it makes no environment, or one with a space of no known kind.
        """
        import gymnasium
        from gymnasium.vector import VectorEnv
        from shoal.envs.old_interface import OldEnvironment

        env = self.make(**kwargs)
        if isinstance(env, gymnasium.Env):
            return env
        expected = f"{self.env_id}: expected one environment from {self.make!r}, got {type(env).__name__}"
        if isinstance(env, VectorEnv):
            raise ValueError(f"{expected}, which steps all slots at once: set env.vectorization=native")
        if hasattr(env, "possible_agents"):
            raise ValueError(f"{expected}; a PettingZoo game is named pettingzoo:module:function")
        missing = [name for name in ("reset", "step", "observation_space", "action_space") if not hasattr(env, name)]
        if missing:
            raise ValueError(f"{expected}, which is no environment: it has no {', '.join(missing)}")
        return OldEnvironment(env)
