"""Continuing a run: which checkpoint, whether its weights can read the environment, and what is taken from it."""

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
    """What a run starts from."""

    checkpoint: Checkpoint | None
    """None for a fresh run."""
    run_id: str
    session: int
    """How often the run was resumed."""


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
    """How the weights of a resumed run are to read the environment; None for fresh ones, which take its order.

    Raises:
        ValueError: they do not fit, or something is mapped without weights that could have other names.
    """
    settings = config.policy
    remapping = Remapping(
        NameMap(settings.map_features, "policy.map_features"), NameMap(settings.map_actions, "policy.map_actions")
    )
    if origin.checkpoint:
        return remap(origin.checkpoint.state["policy"], observation, actions, remapping)
    for names in (remapping.features, remapping.actions):
        if names.entries:
            raise ValueError(f"{names.option}: nothing is resumed, so there are no other names to map to")
    return None


def restore(origin: Origin, worker: LearnerWorker) -> None:
    """Load the checkpoint into the learner and continue its ledger.

    What was in flight when the checkpoint was saved can no longer come: it is dropped as ``restart``.
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
