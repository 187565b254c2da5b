"""Says which settings a run goes on with that are not those it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from shoal.deploy.settings.differences import NO_DIFFERENCES, Change, Differences, differences
from shoal.deploy.settings.earlier import earlier_file
from shoal.deploy.settings.load import to_dict
from shoal.deploy.settings.sections import Config
from shoal.learner.checkpoint import Checkpoint

log = logging.getLogger(__name__)

MOST_LINES = 12
"""Changed settings that are said; the others are counted."""
_OF_NO_CONCERN = ("run_dir", "resume", "max_seconds", "metrics", "log", "checkpoint", "recorder", "cluster")
"""Settings that say where and how a run is kept and watched: what is learned does not depend on them."""
_SAID_ELSEWHERE = ("policy.map_features", "policy.map_actions")
_OF_FRESH_WEIGHTS = "policy.initialization."
_OF_THE_RETURN = ("env.id", "env.kwargs", "env.wrappers", "env.reset_options")
"""Settings that say what is played and rewarded."""


def changed_settings(config: Config, checkpoint: Checkpoint) -> Differences:
    """What differs between ``config`` and the settings that a checkpoint was trained with, but for where and how a run
    is kept and watched.

    Imported weights were not trained with settings of shoal.
    """
    saved = checkpoint.state["config"]
    if "imported_from" in checkpoint.state or not isinstance(saved, Mapping):
        return NO_DIFFERENCES
    return differences(saved, to_dict(config)).without(_OF_NO_CONCERN + _SAID_ELSEWHERE)


def tell(changes: Differences, checkpoint: Checkpoint, run_dir: Path | None) -> None:
    """Warn of changed settings, a line each.

    Args:
        changes: what differs.
        checkpoint: the one that the run goes on from.
        run_dir: the directory of the run, if it is the one that saved the checkpoint; None if it is a new one.
    """
    version = checkpoint.policy_version
    if unknown := changes.unknown(f"policy version {version}"):
        log.info("settings of another shoal: %s", unknown)
    changed = [change for change in changes.changed if not change.name.startswith(_OF_FRESH_WEIGHTS)]
    for change in changes.changed:
        if change not in changed:
            log.warning(
                "%s=%s has no effect: the weights are resumed, and were made with %s",
                change.name,
                change.after,
                change.before,
            )
    # What makes two runs of one is said in any case.
    changed.sort(key=lambda change: not _is_of_the_return(change))
    if run_dir is not None:
        what, had = f"settings changed since version {version}", earlier_file(run_dir, version)
    else:
        what, had = f"settings differ from those of {checkpoint.path}", checkpoint.path.parent.parent / "config.yaml"
    for change in changed[:MOST_LINES]:
        log.warning("%s: %s%s", what, change, " (the default)" if change.is_default else "")
    if len(changed) > MOST_LINES:
        log.warning("%s: and %d more", what, len(changed) - MOST_LINES)
    if run_dir is not None and any(map(_is_of_the_return, changed)):
        log.warning(
            "returns of this run up to version %d and after it are not of the same game: its curves, means and best "
            "have both; a run of its own begins with resume=%s and another run_dir",
            version,
            checkpoint.path,
        )
    if any(change.is_default for change in changed):
        log.warning(
            "settings that a command leaves out have their defaults, also in a run that goes on; --config %s takes "
            "those that it was trained with",
            had,
        )


def _is_of_the_return(change: Change) -> bool:
    return any(change.name == name or change.name.startswith(f"{name}.") for name in _OF_THE_RETURN)
