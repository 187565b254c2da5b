"""The user's modules that are installed nowhere and lie beside the run: they are sent to the nodes of a cluster."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from shoal.deploy.cluster.named_packages import named_packages
from shoal.deploy.settings.sections import Config


def own_modules(config: Config) -> list[Path]:
    """Files and folders of packages that the run's settings name, and those beside them that they have imported.

    A module is one's own where it lies neither in an installation (site-packages) nor in Python's library: in the
    current directory, on PYTHONPATH, or in a checkout that is installed editable. What it imports is known once it has
    been imported here, as a check of the settings does.
    """
    found: dict[str, Path] = {}
    for package in named_packages(config):
        if package != "shoal" and (place := _place(package)) is not None:
            found[package] = place
    beside = {place.parent for place in found.values()}
    for name in [name for name in sys.modules if "." not in name]:
        place = _place(name) if name not in ("__main__", "shoal") else None
        if place is not None and place.parent in beside:
            found[name] = place
    return [found[name] for name in sorted(found)]


def names_of(py_modules: Iterable[object]) -> set[str]:
    """Names of the modules that ``runtime_env["py_modules"]`` sends already."""
    return {Path(str(one)).name.partition("-")[0].partition(".")[0] for one in py_modules}


def _place(name: str) -> Path | None:
    """The file or folder of a top-level module of the user's own; None of any other."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module without a spec: made by a program
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    place = file.parent if spec.submodule_search_locations else file
    if not file.is_file() or file.suffix != ".py" or any(place.is_relative_to(one) for one in _installations()):
        return None
    return place.resolve()


def _installations() -> list[Path]:
    paths = {
        path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    # A virtual environment can show what another one has.
    paths |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    return [Path(path) for path in paths if path]
