"""Ray for the length of a run: started and stopped on this machine, or a cluster that is running already."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from shoal.deploy.placement.hardware import available_cores

SMALLEST_STORE_BYTES = 256 * 2**20
UNROLLS_PER_ACTOR_IN_STORE = 8
LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RaySession:
    """Placement and address of the processes of a run in Ray."""

    address: str
    """The address at which the run's other processes reach this one."""
    actor_options: dict[str, Any]
    """Ray options of a rollout actor."""
    learner_options: dict[str, Any]
    """Ray options of a peer learner."""

    @property
    def put(self) -> Callable[[Any], Any]:
        """Shares a value with all processes."""
        return ray.put


def configure() -> None:
    """Ray's environment variables, before it starts anything; what is set already stays."""
    # Nothing is sent to anybody by a training run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors ask for no GPU; Ray would warn that it will one day stop hiding the GPUs from them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at niceness 15: gradient threads would starve the actors, and then wait for them.
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextlib.contextmanager
def local(*, num_actors: int, num_learners: int, unroll_bytes: int, accelerator: bool) -> Iterator[RaySession]:
    """A Ray of our own on this machine, for rollout actors and peer learners."""
    configure()
    store = max(SMALLEST_STORE_BYTES, num_actors * unroll_bytes * UNROLLS_PER_ACTOR_IN_STORE)
    ray.init(
        address="local",
        # Processes are counted here, whatever the number of cores: there may be more of them.
        num_cpus=max(available_cores(), num_actors + num_learners),
        num_gpus=num_learners if accelerator else 0,
        object_store_memory=store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        learner = {"num_cpus": 1, "num_gpus": int(accelerator)}
        yield RaySession(address=LOOPBACK, actor_options={"num_cpus": 1}, learner_options=learner)
    finally:
        ray.shutdown()
