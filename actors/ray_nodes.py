"""Ray's view of its nodes and starting processes, and ending a process on another node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.actors.ray_actor import ProcessLocation

ANSWER_SECONDS = 2.0
"""How long the head may take to answer.

Ray's other ways to ask wait for as long as it takes, and Ray ends a process that has waited for its head for a minute,
also one that has been disconnected and trains on with another Ray meanwhile.
"""


class RayNode(NamedTuple):
    """A living node, as the head knows it."""

    node_id: str
    """Hexadecimal."""
    address: str
    resources: Mapping[str, float]
    available: Mapping[str, float]
    """What of ``resources`` is free."""
    labels: Mapping[str, str]


class NoAnswer(Exception):
    """The head did not answer in time: it is busy, out of reach, or has ended."""


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RpcError as error:
        from ray._raylet import (  # type: ignore[attr-defined]  # no public names, nor types (Ray 2.60)
            GRPC_STATUS_CODE_DEADLINE_EXCEEDED,
            GRPC_STATUS_CODE_UNAVAILABLE,
        )

        if error.rpc_code in (GRPC_STATUS_CODE_DEADLINE_EXCEEDED, GRPC_STATUS_CODE_UNAVAILABLE):
            raise NoAnswer(str(error)) from error
        raise


def _head() -> Any:
    # There is no public way with a time limit (Ray 2.60).
    from ray._private.worker import global_worker

    return global_worker.gcs_client


def living_nodes(seconds: float = ANSWER_SECONDS) -> list[RayNode]:
    """All nodes that have not ended, as far as the head has noticed.

    Raises:
        NoAnswer: within so many ``seconds``, to one of two questions.
    """
    with _answered():
        nodes = _head().get_all_node_info(timeout=seconds)
        usage = _head().get_all_resource_usage(timeout=seconds).resource_usage_data.batch
    available = {one.node_id: dict(one.resources_available) for one in usage}
    return [
        RayNode(
            node_id.hex(),
            info.node_manager_address,
            dict(info.resources_total),
            available.get(node_id.binary(), {}),
            dict(info.labels),
        )
        for node_id, info in nodes.items()
        if info.state == info.ALIVE
    ]


def is_autoscaled(seconds: float = ANSWER_SECONDS) -> bool:
    """Whether an autoscaler has told the head which nodes there may be.

    Raises:
        NoAnswer: within so many ``seconds``.
    """
    from ray._raylet import (  # type: ignore[attr-defined]  # no public names, nor types (Ray 2.60)
        GCS_AUTOSCALER_CLUSTER_CONFIG_KEY,
        GCS_AUTOSCALER_STATE_NAMESPACE,
    )

    key, namespace = GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    with _answered():
        return bool(_head().internal_kv_get(key, namespace, timeout=seconds))


def draining_nodes(seconds: float = ANSWER_SECONDS) -> frozenset[str]:
    """Ids of nodes that are draining: preempted, scaled down, or stopped by hand.

    Raises:
        NoAnswer: within so many ``seconds``.
    """
    with _answered():
        return frozenset(_head().get_draining_nodes(timeout=seconds))


def starting_processes() -> dict[str, ProcessLocation]:
    """Processes of this job's actors that have a node and have not finished their start, by actor id.

    Raises:
        NoAnswer: within ``ANSWER_SECONDS``.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())

    async def ask() -> Any:
        return await _head().async_get_all_actor_info(
            job_id=job, actor_state_name="PENDING_CREATION", timeout=ANSWER_SECONDS
        )

    with _answered():
        pending = asyncio.run(ask())
    # The process id is known once the actor has a node.
    return {
        actor.hex(): ProcessLocation(info.address.node_id.hex(), info.pid)
        for actor, info in pending.items()
        if info.pid
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
