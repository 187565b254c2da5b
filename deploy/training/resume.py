"""Continues a run: finds its checkpoint, matches its weights to the environment, and restores learner and ledger."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.deploy.settings.differences import NO_DIFFERENCES, Differences
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.changed_settings import changed_settings, tell
from shoal.envs.plain_state import DoesNotFit, from_plain
from shoal.learner.checked_files import read_json
from shoal.learner.checkpoint import Checkpoint, CheckpointError, Checkpoints, find_saved, refusing_damage
from shoal.learner.learner import Learner
from shoal.learner.learner_worker import LearnerWorker
from shoal.learner.opponents import OpponentPool
from shoal.learner.statistics import RunStatistics
from shoal.policy.actions import Actions
from shoal.policy.observation import Observation
from shoal.policy.remap import NameMap, PolicyInterface, Remapping, remap
from shoal.policy.weights import published_tensors

log = logging.getLogger(__name__)

_NEEDED = ("run_id", "session", "ledger", "config")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The start of a run: a checkpoint, or fresh weights."""

    checkpoint: Checkpoint | None
    """None for a fresh run."""
    run_id: str
    session: int
    """Number of times the run was resumed."""
    same_run: bool = False
    """Whether the checkpoint is of this very run, or of the run that its directory is a copy of."""
    run_state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The checkpoint's state of the whole run, also where this is the origin of one of several policies."""
    changes: Differences = NO_DIFFERENCES
    """What differs from the settings that the checkpoint was trained with."""

    @property
    def trained_with(self) -> tuple[int, Mapping[str, Any]]:
        """The checkpoint's policy version, and the settings of the run that trained it."""
        return self.run_state["policy_version"], self.run_state["config"]

    def of(self, policy: str) -> Origin:
        """That of one of several policies."""
        if self.checkpoint is None:
            return self
        return dataclasses.replace(self, checkpoint=self.checkpoint.policies[policy])


def find_origin(config: Config, checkpoints: Checkpoints) -> Origin:
    """The checkpoint that ``config.resume`` asks for, or a fresh run.

    A run in another directory than its checkpoint's is a new run with weights and counts of the old one. So is one in a
    copy of a run directory that is still there, which has the statistics and environments of the old one, too.

    Raises:
        CheckpointError: no checkpoint can be used, or no run saved it.
    """
    checkpoint = None
    if config.resume == "auto":
        checkpoint = checkpoints.latest()
    elif config.resume != "never":
        checkpoint = find_saved(Path(config.resume))
    if checkpoint is None:
        return Origin(checkpoint=None, run_id=uuid.uuid4().hex, session=0)
    check_origin(config, checkpoint)
    state, run_dir = checkpoint.state, checkpoints.directory.parent
    same = config.resume == "auto" or _is_among(checkpoint, checkpoints)
    original = _copied_from(state, run_dir) if same else None
    keeps_id = same and original is None
    run_id = state["run_id"] if keeps_id else uuid.uuid4().hex
    of = "this run" if keeps_id else f"run {state['run_id']}, as the new run {run_id}"
    log.info("resumed from %s of %s, session %d", checkpoint.path, of, 1 + state["session"])
    if original is not None:
        log.warning(
            "%s is a copy of %s: it goes on as a run of its own, with the new run_id %s", run_dir, original, run_id
        )
    changes = changed_settings(config, checkpoint)
    tell(changes, checkpoint, run_dir if same else None)
    return Origin(
        checkpoint=checkpoint,
        run_id=run_id,
        session=1 + state["session"],
        same_run=same,
        run_state=state,
        changes=changes,
    )


def _is_among(checkpoint: Checkpoint, checkpoints: Checkpoints) -> bool:
    """Whether it is one of the run's. Links may lead to either: ``RUN/checkpoints`` may be on other storage."""
    own = (checkpoints.directory, checkpoints.directory.parent / "best")
    found_in = (checkpoint.path.parent, checkpoint.path.resolve().parent)
    return any(mine.exists() and mine.samefile(theirs) for mine in own for theirs in found_in)


def _copied_from(state: Mapping[str, Any], run_dir: Path) -> Path | None:
    """The run directory that ``run_dir`` is a copy of, where that is still there, as another directory with this run.

    A run that was moved has left its old place. A run whose directory has several paths, through links or other mount
    points, is found at all of them. Where nothing can be told, there is no copy.
    """
    original = Path(str(state.get("run_dir", "")))
    try:
        if not original.is_absolute() or original == run_dir.resolve() or state["run_id"] not in _run_ids(original):
            return None
        # Devices and inodes are no proof of another directory: the same storage mounted twice may have others.
        with tempfile.NamedTemporaryFile(dir=run_dir, prefix=".is-this-") as file:
            return None if (original / Path(file.name).name).exists() else original
    except (OSError, ValueError):
        return None


def _run_ids(run_dir: Path) -> set[str]:
    """Ids of the runs that saved the checkpoints of a run directory; of damaged ones none."""
    found: set[str] = set()
    for path in (run_dir / "checkpoints").glob("[0-9]*/state.json"):
        try:
            found.add(str(read_json(path).get("run_id")))
        except (OSError, ValueError):
            continue
    return found


def check_origin(config: Config, checkpoint: Checkpoint) -> None:
    """Check that a run with these settings can go on from what the checkpoint holds.

    Raises:
        CheckpointError: no run saved it or one of its policies, or it holds other policies than the settings name.
    """
    for each in (checkpoint, *checkpoint.policies.values()):
        if missing := [name for name in _NEEDED if name not in each.state]:
            raise CheckpointError(f"{each.path} was not saved by a run: its state lacks {', '.join(missing)}")
    named, held = list(config.policies), list(checkpoint.policies)
    if sorted(named) == sorted(held):
        return
    of = f"the policies {', '.join(held)}" if held else "one policy for all agents"
    saved_with = checkpoint.state["config"]
    if not held and isinstance(saved_with, dict) and saved_with.get("policies"):
        of = "one of several policies"
    wanted = f"policies names {', '.join(named)}" if named else "policies names none"
    anew = "set another run_dir" if config.resume == "auto" else "leave resume out"
    raise CheckpointError(f"{checkpoint.path} holds {of}, and {wanted}; name the same ones, or {anew}")


def match_names(config: Config, origin: Origin, observation: Observation, actions: Actions) -> PolicyInterface | None:
    """The names by which a resumed run's weights read the environment; None for fresh weights, which take its order.

    Raises:
        ValueError: they do not fit, or names are mapped though nothing is resumed.
    """
    settings = config.policy
    remapping = Remapping(
        NameMap(settings.map_features, "policy.map_features"), NameMap(settings.map_actions, "policy.map_actions")
    )
    if origin.checkpoint:
        with refusing_damage(origin.checkpoint.path, passed_on=ValueError):
            return remap(origin.checkpoint.state["policy"], observation, actions, remapping)
    for names in (remapping.features, remapping.actions):
        if names.entries:
            raise ValueError(f"{names.option}: nothing is resumed, so there are no trained names to map to")
    return None


def restore(origin: Origin, worker: LearnerWorker, statistics: RunStatistics) -> None:
    """Load the checkpoint into the learner and continue its ledger and, if it is of this run, its statistics.

    Steps that were in flight when the checkpoint was saved are lost: they are dropped as ``restart``.

    Raises:
        CheckpointError: the checkpoint does not fit the learner, or holds damaged versions for self-play.
    """
    if origin.checkpoint is None:
        return
    origin.checkpoint.restore(worker.learner)
    if origin.checkpoint.has_opponents and worker.opponents is not None:
        _restore_opponents(origin.checkpoint, worker.learner, worker.opponents)
    statistics.policy_version = worker.learner.policy_version
    if origin.same_run and "statistics" in origin.checkpoint.state:
        try:
            statistics.set_state(origin.checkpoint.state["statistics"])
        except ValueError as error:
            log.warning("means over the last episodes begin anew: those of %s are %s", origin.checkpoint.path, error)
    saved, ledger = origin.checkpoint.state["ledger"], worker.queue.ledger
    ledger.sampled, ledger.trained = saved["sampled"], saved["trained"]
    ledger.dropped.update(saved["dropped"])
    ledger.dropped["restart"] += saved["in_flight"]
    if not ledger.dropped["restart"]:
        del ledger.dropped["restart"]


def restore_options(config: Config, origin: Origin, worker: LearnerWorker) -> None:
    """Go on with the options that callbacks had set for the episodes of this environment."""
    saved = origin.run_state.get("config")
    env = saved.get("env") if isinstance(saved, dict) else None
    if not isinstance(env, dict) or env.get("id") != config.env.id:
        return
    try:
        options, published = (
            from_plain(origin.run_state.get(name)) for name in ("episode_options", "published_options")
        )
    except DoesNotFit as error:
        log.warning("episodes begin without the options of the checkpoint: %s", error)
        return
    if isinstance(options, dict):
        worker.env_options = options
        worker.first_options = published if isinstance(published, dict) else {}


def _restore_opponents(checkpoint: Checkpoint, learner: Learner, pool: OpponentPool) -> None:
    size = sum(tensor.numel() for tensor in published_tensors(learner.policy).values())
    try:
        pool.set_state(checkpoint.load_opponents(), size)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: the versions for self-play do not fit: {error}; resume another checkpoint, or train "
            "on with self_play.share=0"
        ) from error
