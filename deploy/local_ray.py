"""Ray on this machine, started and stopped by the command."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray

from deploy.hardware import available_cores

SMALLEST_STORE_BYTES = 256 * 2**20
UNROLLS_PER_ACTOR_IN_STORE = 8


@contextlib.contextmanager
def session(num_actors: int, *, unroll_bytes: int) -> Iterator[Callable[[Any], Any]]:
    """A Ray of our own for the length of the block; yields ``ray.put``."""
    # Nothing is sent to anybody by a training run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors ask for no GPU; Ray would warn that it will one day stop hiding the GPUs from them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs workers at niceness 15: gradient threads would starve the actors, and then wait for them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    store = max(SMALLEST_STORE_BYTES, num_actors * unroll_bytes * UNROLLS_PER_ACTOR_IN_STORE)
    ray.init(
        address="local",
        # Actors are counted here, whatever the number of cores: there may be more of them.
        num_cpus=max(available_cores(), num_actors),
        object_store_memory=store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield ray.put
    finally:
        ray.shutdown()
