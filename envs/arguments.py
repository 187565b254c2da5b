"""The environment's own arguments: told apart from the settings of ``env``, and explained where they are wrong."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shoal.envs.config import OPTION_NAMES, EnvironmentNotFound


def refuse_settings(env_id: str, kwargs: Mapping[str, Any], takes: Callable[..., Any] | None) -> None:
    """Refuse arguments that are settings of ``env``, unless ``takes``, which makes the environment, has such a one.

    Raises:
        ValueError: ``kwargs`` has a setting; the message says where to write it.
    """
    own = parameters(takes)
    if moved := [name for name in OPTION_NAMES if name in kwargs and name not in own]:
        raise ValueError(
            f"{env_id}: env.kwargs.{moved[0]} is no argument of the environment; it is a setting of its own: write "
            + " ".join(f"env.{name}={kwargs[name]}" for name in moved)
        )


def parameters(takes: Callable[..., Any] | None) -> set[str]:
    """The names of a callable's parameters, as far as it says them."""
    try:
        return set(inspect.signature(takes).parameters) if takes else set()
    except (TypeError, ValueError):  # made in C, which says nothing about itself
        return set()


@contextlib.contextmanager
def naming_bad_arguments(env_id: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Translate the exceptions raised while an environment is created.

    Raises:
        EnvironmentNotFound: its package is not installed.
        ValueError: it rejects the arguments.
    """
    import gymnasium

    try:
        yield
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise EnvironmentNotFound(f"environment {env_id!r} needs a package: {error}") from error
    except TypeError as error:
        if not kwargs:
            raise
        raise ValueError(f"{env_id}: {error}") from error
