"""The user's classes and functions that no import finds, by the names that settings have for them.

Those of a notebook, or of the script that runs: ``actors.user_code`` takes them to the other processes of a run.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

environments: dict[str, Callable[..., Any]] = {}
"""By ``env.id``: each makes one environment."""
policies: dict[str, type[Any]] = {}
"""Subclasses of ``RecurrentPolicy`` by ``policy.kind``."""
losses: dict[str, Callable[..., Any]] = {}
"""By ``learner.loss``."""
optimizers: dict[str, type[Any]] = {}
"""Subclasses of ``torch.optim.Optimizer`` by ``learner.optimizer``."""
schedules: dict[str, Callable[..., Any]] = {}
"""By ``learner.schedules.NAME.kind``: each maps progress to a factor."""
cores: dict[str, type[Any]] = {}
"""Subclasses of ``Core`` by ``policy.core``."""
sinks: dict[str, type[Any]] = {}
"""Subclasses of ``Sink`` by ``log.sinks``. They stay in this process."""


def no_module(error: ModuleNotFoundError) -> str:
    """Say what to do about a module of the user's that is not found."""
    return (
        f"there is no module {error.name!r} here; install the package that has it, or start in the directory where it "
        "lies"
    )


def ends(error: SystemExit) -> str:
    """Say of the user's code what it does where it raises ``error``."""
    return (
        f"ends the program (exit {error.code!r}) where it is imported or made; what a script runs belongs under "
        'if __name__ == "__main__"'
    )


def find(name: str, known: Mapping[str, Any], what: str = "") -> Any:
    """What ``package.module:Name`` stands for: one of ``known``, or what an import finds.

    Raises:
        ValueError: there is nothing of this name; ``what`` says in the message what was looked for.
    """
    if name in known:
        return known[name]
    module, _, rest = name.partition(":")
    try:
        return pkgutil.resolve_name(name)
    except ModuleNotFoundError as error:
        raise ValueError(no_module(error)) from error
    except ImportError as error:
        raise ValueError(f"{module} cannot be imported: {error}") from error
    except SystemExit as error:
        raise ValueError(f"{module} {ends(error)}") from error
    except (AttributeError, ValueError) as error:
        if module == "__main__":
            where = f"it was defined in a script or notebook, and {rest} is not defined in this one"
        elif module not in sys.modules:
            where = f"{module} cannot be imported: {type(error).__name__}: {error}"
        else:
            where = f"{module} has no {f'{what} {rest}'.strip()}"
        raise ValueError(where) from error
