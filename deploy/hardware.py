"""How many actors and threads this machine takes, where the configuration says ``auto``."""

from __future__ import annotations

import os

from deploy.config import Config


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_actors(config: Config, *, accelerator: bool) -> int:
    """Rollout actors.

    With an accelerator all cores but one make rollouts. Without one acting and learning on a step cost about the same,
    so half of the cores act.
    """
    if config.actor.num_actors != "auto":
        return config.actor.num_actors
    if config.mode == "inline":
        return 1
    cores = available_cores()
    chosen = max(1, cores - 1 if accelerator else cores // 2)
    if config.actor.max_policy_lag == 0:
        # Lock step shares a batch equally: the largest number that divides it.
        unrolls = config.learner.batch_size // config.env.num_envs
        chosen = next(n for n in range(min(chosen, unrolls), 0, -1) if unrolls % n == 0)
    return chosen


def gradient_threads(config: Config, *, num_actors: int, accelerator: bool) -> int:
    """Gradient threads of a learner on the CPU: the cores that do not act.

    More would fill the moments when an actor waits, but smaller shards cost more per step than that brings.
    """
    if config.learner.num_threads != "auto":
        return config.learner.num_threads
    return 1 if accelerator else max(1, available_cores() - num_actors)
