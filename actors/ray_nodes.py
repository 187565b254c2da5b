"""What Ray tells of its nodes, and the one thing that has to be done on another one."""

from __future__ import annotations

import contextlib
import os
import signal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.actors.ray_actor import ProcessLocation


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that were told to end soon: preempted, scaled down, or stopped by hand."""
    # Nothing public tells it (Ray 2.60).
    from ray._private.state import state

    return frozenset(state.get_draining_nodes())


def starting_processes() -> dict[str, ProcessLocation]:
    """By actor id: the processes of this job's actors that have a place, and have not finished their start."""
    # Nothing public tells it without a dashboard (Ray 2.60). A process id comes with the place.
    from ray._private.state import state

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    pending = state.actor_table(None, job, "PENDING_CREATION")
    return {
        actor: ProcessLocation(info["Address"]["NodeID"], info["Pid"]) for actor, info in pending.items() if info["Pid"]
    }


def end_process(place: ProcessLocation) -> None:
    """SIGKILL: a process that hangs may not hear Ray asking, and would keep its core."""
    if place.node_id == ray.get_runtime_context().get_node_id():
        _sigkill(place.process_id)
        return
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    # Nobody waits for it: a node that does not answer is ended by Ray, with all that runs there.
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_sigkill).remote(place.process_id)


def _sigkill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
