"""Code of the user's that settings name with its arguments, and that the process of the run alone calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from shoal import given
from shoal.envs.raised import raised


def find(name: str, known: Mapping[str, Any], what: str = "") -> Any:
    """As ``given.find``, for modules that may raise anything while they are imported.

    Raises:
        ValueError: there is nothing of this name, or its module cannot be imported.
    """
    try:
        return given.find(name, known, what)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name.partition(':')[0]} cannot be imported: {raised(error)}") from error


def check_arguments(found: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Whether ``found`` takes these arguments; it is not called.

    Raises:
        ValueError: it does not.
    """
    try:
        check_call(found, **kwargs)
    except TypeError as error:
        raise ValueError(f"{error}; its kwargs are {dict(kwargs)}") from error


def check_call(found: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Whether ``found`` may be called like this; it is not called. One that does not tell what it takes may.

    Raises:
        TypeError: it may not.
    """
    try:
        signature = inspect.signature(found)
    except ValueError:  # builtins and compiled functions
        return
    signature.bind(*args, **kwargs)
