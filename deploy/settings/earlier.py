"""The settings that a run had before it went on with others: ``RUN/configs/until_VERSION.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shoal.deploy.settings.differences import Differences, differences
from shoal.deploy.settings.load import dump, read_settings

FOLDER = "configs"


class ChangedAt(NamedTuple):
    """Settings that changed in the course of a run."""

    version: int
    """The last policy version that was trained with those before."""
    differences: Differences


def earlier_file(run_dir: Path, version: int) -> Path:
    """The file of the settings that the policy versions up to ``version`` were trained with."""
    return run_dir / FOLDER / f"until_{version}.yaml"


def keep(run_dir: Path, version: int, settings: Mapping[str, Any]) -> None:
    """Keep the settings of the policy versions up to ``version``, while ``config.yaml`` is that of the last session.

    A run that goes on from an older version than its newest has lost the versions after it: so are their settings.

    Args:
        run_dir: directory of the run.
        version: the version that the run goes on from.
        settings: those in its checkpoint.
    """
    path = earlier_file(run_dir, version)
    path.parent.mkdir(exist_ok=True)
    for later in (each for at, each in _files(run_dir).items() if at > version):
        later.unlink()
    if path.exists():
        # A session that trained nothing has saved the version again, with its own settings.
        return
    path.write_text(dump(settings))


def changes_of(run_dir: Path) -> list[ChangedAt]:
    """What changed in the course of a run, in order; files that cannot be read are left out."""
    kept = [(at, settings) for at, path in sorted(_files(run_dir).items()) if (settings := _read(path))]
    if not kept or not (last := _read(run_dir / "config.yaml")):
        return []
    after = [*(settings for _, settings in kept[1:]), last]
    return [ChangedAt(at, differences(settings, then)) for (at, settings), then in zip(kept, after, strict=True)]


def _files(run_dir: Path) -> dict[int, Path]:
    found = {path.stem.removeprefix("until_"): path for path in (run_dir / FOLDER).glob("until_*.yaml")}
    return {int(version): path for version, path in found.items() if version.isdecimal()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_settings(path)
    except ValueError:
        return {}
