"""Says of an environment id that names nothing what was looked for, and what may be meant."""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import gymnasium
from shoal.envs.entry_points import makes_environment

_PACKAGES = {"ALE": "ale_py", "MiniGrid": "minigrid", "popgym": "popgym", "VizDoom": "vizdoom", "BabyAI": "minigrid"}
"""Gymnasium namespaces and the modules that register them."""
_MOST_FILES = 1000
"""Of a package, that are searched."""
_MOST_BYTES = 2**20
"""Of a file that is searched."""
_MOST_NAMES = 6


def why_unknown(module: str, name: str, error: Exception) -> str:
    """What is wrong with the id ``module:name`` that names nothing, and what to do.

    Args:
        module: imported already; empty if the id names none.
        name: what follows it.
        error: what gymnasium says of ``name``.
    """
    if module == "__main__" or set("<(") & set(name):
        return (
            f"was defined in a script or notebook, and {name} is not defined in this one: define it here before or "
            "give it as env=..., or move it to a module of its own and name it package.module:Name"
        )
    found = sys.modules.get(module)
    if hasattr(found, name):
        return (
            "is no class with reset and step, and no function that says that it makes one: annotate the function "
            f"-> gymnasium.Env, register it, as gymnasium.register('Name-v0', entry_point=...), or give it from "
            f"Python, as env={name}"
        )
    if found is not None:
        return _unknown_in(found, name)
    if package := _PACKAGES.get(name.partition("/")[0].partition("-")[0]):
        return f"is unknown: install {package.replace('_', '-')} and write {package}:{name}"
    close = difflib.get_close_matches(name, gymnasium.registry, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"({error})"
    return f"is unknown: {hint} If a package registers it, write package.module:Env-v0 and install that package"


def _unknown_in(module: ModuleType, name: str) -> str:
    here = module.__name__
    looked = f"is unknown: importing {here} registers no {name}, and {here} has no class or function of that name"
    if places := _submodules_that_name(module, name):
        meant = " or ".join(f"{place}:{name}" for place in places)
        return f"{looked}; it is in a module inside {here}: write {meant}"
    package = here.partition(".")[0]
    ids = [each for each, spec in gymnasium.registry.items() if _made_by(spec).partition(".")[0] == package]
    makers = [each for each, value in vars(module).items() if makes_environment(value) and not _is_gymnasiums(value)]
    prefix = "" if package == "gymnasium" else f"{here}:"
    own = list(dict.fromkeys([*ids, *makers]))
    close = [f"{prefix}{each}" for each in difflib.get_close_matches(name, own, cutoff=0.6)]
    if close := close or difflib.get_close_matches(name, gymnasium.registry, cutoff=0.8):
        return f"{looked}; did you mean {' or '.join(close)}?"
    if own:
        shown = ", ".join(f"{prefix}{each}" for each in own[:_MOST_NAMES])
        return f"{looked}; there are {shown}{', ...' * (len(own) > _MOST_NAMES)}"
    return f"{looked}; write package.module:Name with the module that registers or defines it"


def _made_by(spec: gymnasium.envs.registration.EnvSpec) -> str:
    """The module of what makes the environment."""
    made_by = spec.entry_point if isinstance(spec.entry_point, str) else getattr(spec.entry_point, "__module__", "")
    return str(made_by).partition(":")[0]


def _is_gymnasiums(value: object) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == "gymnasium"


def _submodules_that_name(package: ModuleType, name: str) -> list[str]:
    """Modules inside a package whose text registers or defines ``name``. They are read and not imported: importing
    whatever a package has may do anything."""
    word = re.escape(name)
    pattern = re.compile(rf"""["']{word}["']|^\s*(?:class|def)\s+{word}\b""", re.MULTILINE)
    return [module for module, text in itertools.islice(_sources(package), _MOST_FILES) if pattern.search(text)][:3]


def _sources(package: ModuleType) -> Iterator[tuple[str, str]]:
    """(name, text) of the modules inside a package, from the outermost ones on."""
    for root in map(Path, getattr(package, "__path__", ())):
        for file in sorted(root.rglob("*.py"), key=lambda path: (len(path.parts), path)):
            parts = file.relative_to(root).with_suffix("").parts
            inner = parts[:-1] if parts[-1] == "__init__" else parts
            if not inner or "tests" in inner or not all(map(str.isidentifier, inner)):
                continue
            try:
                if file.stat().st_size <= _MOST_BYTES:
                    yield ".".join((package.__name__, *inner)), file.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
