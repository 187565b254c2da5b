"""The acting side of a run in one process, in its checkpoints: a resumed run ends as if it had not been interrupted.

Saved between two updates, where no unroll is under way: environments, memory, the rows that the next unrolls begin
with, unrolls that wait for their update, and the process' random streams. Where rollout workers are processes of their
own, they do not stand still for a checkpoint: there the environments of a resumed run begin anew.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shoal.actors.pool import InlinePool
from shoal.deploy.settings.load import to_dict
from shoal.deploy.settings.sections import Config
from shoal.deploy.training.resume import Origin
from shoal.envs.plain_state import DoesNotFit, from_plain, to_plain
from shoal.learner.checkpoint import CheckpointError
from shoal.learner.learner_worker import LearnerWorker

if TYPE_CHECKING:
    from shoal.deploy.training.prepared_run import PreparedRun
    from shoal.deploy.training.worker_group import Pool

log = logging.getLogger(__name__)


def get_rollouts(worker: LearnerWorker, pool: InlinePool) -> dict[str, Any]:
    """The acting side's state as plain data and arrays."""
    return {
        "queue": worker.queue.get_state(),
        "pool": pool.get_state(),
        "random": {
            "python": to_plain(random.getstate()),
            "numpy": to_plain(np.random.get_state(legacy=False)),  # noqa: NPY002  (what environments draw from)
            "torch": torch.get_rng_state().numpy(),
        },
    }


def find_rollouts(config: Config, origin: Origin) -> Mapping[str, Any] | None:
    """The state that a resumed run goes on from; None where its environments begin anew."""
    checkpoint = origin.checkpoint
    if checkpoint is None or config.mode != "inline" or not origin.same_run or not checkpoint.has_rollouts:
        return None
    saved = checkpoint.state["config"]
    if not isinstance(saved, dict) or saved.get("env") != json.loads(json.dumps(to_dict(config)["env"])):
        log.warning("the environments begin anew: settings of env are others than those of %s", checkpoint.path)
        return None
    try:
        found = checkpoint.load_rollouts()
        if not isinstance(found, dict) or not found.keys() >= {"queue", "pool", "random"}:
            raise CheckpointError("parts of it are missing")
    except CheckpointError as error:
        log.warning("the environments begin anew: their state in %s is damaged: %s", checkpoint.path, error)
        return None
    return found


def restore_queue(rollouts: Mapping[str, Any], origin: Origin, worker: LearnerWorker) -> None:
    """Put the unrolls that waited back into the queue, with their steps in flight; where they do not fit, say so.

    The ledger has them as dropped by then (``deploy.training.resume.restore``).
    """
    assert origin.checkpoint is not None
    in_flight, ledger = origin.checkpoint.state["ledger"]["in_flight"], worker.queue.ledger
    try:
        worker.queue.set_state(rollouts["queue"], in_flight)
    except ValueError as error:
        log.warning("unrolls that waited for their update are lost: their state does not fit: %s", error)
        return
    origin.checkpoint.restore_start_states(worker.learner)
    if in_flight:
        ledger.in_flight += in_flight
        ledger.dropped["restart"] -= in_flight
        if not ledger.dropped["restart"]:
            del ledger.dropped["restart"]


def restore_pool(run: PreparedRun, pool: Pool) -> None:
    """Put the environments and memories of a resumed run where they were, and say which begin anew.

    Last of all before training: what was made until now may have drawn from the process' random streams.
    """
    if run.origin.checkpoint is None:
        return
    slots = run.layout.num_actors * run.setup.worker.num_envs
    if run.rollouts is None or not isinstance(pool, InlinePool):
        run.statistics.slots_begun_anew = slots
        return
    begun = pool.set_state(_mapping(run.rollouts["pool"]))
    run.statistics.slots_begun_anew = len(begun)
    try:
        _set_streams(_mapping(run.rollouts["random"]))
    except (DoesNotFit, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        log.warning("the process' random streams begin anew: their state is damaged: %s", error)
    if not begun:
        log.info("all %d slots go on where they were", slots)
        return
    (actor, slot), why = next(iter(begun.items()))
    log.warning(
        "%d of %d slots begin an episode with a seed of their own, so the run is not the same as without the "
        "interruption; actor %d, slot %d: %s. An environment goes on if it has get_state() and set_state(state), or "
        "attributes of plain data only",
        len(begun),
        slots,
        actor,
        slot,
        why,
    )


def _set_streams(state: Mapping[str, Any]) -> None:
    python, numpy, torch_ = from_plain(state["python"]), from_plain(state["numpy"]), state["torch"]
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(torch.from_numpy(torch_.copy()))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
