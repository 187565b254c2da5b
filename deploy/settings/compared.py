"""``shoal config diff``: what differs between two configurations that are named on the command line.

Importing this module imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.settings.differences import differences
from shoal.deploy.settings.load import ConfigError, load_config, read_settings, to_dict


def compare(named: Sequence[str]) -> list[str]:
    """What differs, a line each; none where nothing does.

    Args:
        named: one or two of run directories, files and shipped configurations, then any number of ``key=value``, which
            together are one more. One alone is compared with the defaults, as what comes after them.

    Raises:
        ConfigError: all problems of what is named.
    """
    paths = [name for name in named if "=" not in name or Path(name).exists()]
    settings = [name for name in named if name not in paths]
    if not 1 <= (count := len(paths) + bool(settings)) <= 2:
        raise ConfigError(
            [
                f"expected one or two configurations, got {count}: each a run directory, a file or a shipped one by "
                "name; all key=value together are one"
            ]
        )
    problems: list[str] = []
    sides = [_of_path(Path(path), problems) for path in paths]
    if settings or count == 1:
        sides.insert(len(sides) if settings else 0, _resolved([], settings, problems))
    if count == 1 and settings:
        sides.insert(0, _resolved([], [], problems))
    if problems:
        raise ConfigError(problems)
    found = differences(*sides)
    unknown = found.unknown()
    return [*map(str, found.changed), *([unknown] if unknown else [])]


def _of_path(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_dir():
        return _resolved([path], [], problems)
    # Every setting is in it. A run of another version of shoal may have some that this one refuses.
    if not (path / "config.yaml").is_file():
        problems.append(f"{path}: expected a run directory, got one without config.yaml")
        return {}
    try:
        return read_settings(path / "config.yaml")
    except ValueError as error:
        problems.append(str(error))
        return {}


def _resolved(files: Sequence[Path], settings: Sequence[str], problems: list[str]) -> dict[str, Any]:
    config, found = load_config(files, settings)
    problems += found
    return to_dict(config)
