"""Ray's view of its nodes and starting processes, and ending a process on another node."""

from __future__ import annotations

import contextlib
import os
import signal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.actors.ray_actor import ProcessLocation


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that are draining: preempted, scaled down, or stopped by hand."""
    # There is no public API (Ray 2.60).
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def starting_processes() -> dict[str, ProcessLocation]:
    """Processes of this job's actors that have a node and have not finished their start, by actor id."""
    # There is no public API without a dashboard (Ray 2.60). The process id is known once the actor has a node.
    from ray._private.state import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    pending = state.actor_table(None, job, "PENDING_CREATION")
    return {
        actor: ProcessLocation(info["Address"]["NodeID"], info["Pid"]) for actor, info in pending.items() if info["Pid"]
    }


def end_process(place: ProcessLocation) -> None:
    """Send SIGKILL to a process on any node: one that hangs may not react to Ray, and would keep its core."""
    if place.node_id == ray.get_runtime_context().get_node_id():
        _sigkill(place.process_id)
        return
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    # Nobody waits for it: a node that does not answer is ended by Ray, with all that runs there.
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_sigkill).remote(place.process_id)


def _sigkill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
