"""Continues a run: finds its checkpoint, matches its weights to the environment, and restores learner and ledger."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path

from shoal.deploy.settings.sections import Config
from shoal.learner.checkpoint import Checkpoint, Checkpoints, find_checkpoint
from shoal.learner.learner_worker import LearnerWorker
from shoal.policy.actions import Actions
from shoal.policy.observation import Observation
from shoal.policy.remap import NameMap, PolicyInterface, Remapping, remap


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The start of a run: a checkpoint, or fresh weights."""

    checkpoint: Checkpoint | None
    """None for a fresh run."""
    run_id: str
    session: int
    """Number of times the run was resumed."""


def find_origin(config: Config, checkpoints: Checkpoints) -> Origin:
    """The checkpoint that ``config.resume`` asks for, or a fresh run."""
    checkpoint = None
    if config.resume == "auto":
        checkpoint = checkpoints.latest()
    elif config.resume != "never":
        checkpoint = find_checkpoint(Path(config.resume))
    if checkpoint is None:
        return Origin(checkpoint=None, run_id=uuid.uuid4().hex, session=0)
    state = checkpoint.state
    return Origin(checkpoint=checkpoint, run_id=state["run_id"], session=1 + int(state["session"]))


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
        return remap(origin.checkpoint.state["policy"], observation, actions, remapping)
    for names in (remapping.features, remapping.actions):
        if names.entries:
            raise ValueError(f"{names.option}: nothing is resumed, so there are no trained names to map to")
    return None


def restore(origin: Origin, worker: LearnerWorker) -> None:
    """Load the checkpoint into the learner and continue its ledger.

    Steps that were in flight when the checkpoint was saved are lost: they are dropped as ``restart``.
    """
    if origin.checkpoint is None:
        return
    origin.checkpoint.restore(worker.learner)
    saved, ledger = origin.checkpoint.state["ledger"], worker.queue.ledger
    ledger.sampled, ledger.trained = saved["sampled"], saved["trained"]
    ledger.dropped.update(saved["dropped"])
    ledger.dropped["restart"] += saved["in_flight"]
    if not ledger.dropped["restart"]:
        del ledger.dropped["restart"]
