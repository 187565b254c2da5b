"""The memory that the trajectories of a run need, multiplied out before anything is allocated."""

from __future__ import annotations

from shoal.actors.rollout import trajectory_spec
from shoal.deploy.placement.hardware import memory_bytes
from shoal.deploy.placement.layout import Layout
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec

MAX_COLUMN_LENGTH = 2**31 - 1
"""Numbers that one slot can have in a column of an Arrow record batch."""
ROW_BYTES = 3000
"""Memory of a rollout worker's views of one row of its buffers, measured."""


def check_memory(config: Config, spec: EnvSpec, layout: Layout | None) -> list[str]:
    """The problem of a run whose trajectories do not fit this machine; without one the update may still not fit.

    Every unroll is held in the buffers of its actor, as Arrow bytes, and in the learner's batch.

    Args:
        config: the settings of the run.
        spec: the environment's.
        layout: the layout, if all actors are on this machine; None if it, or their place, is not known.
    """
    envs, steps = config.env.num_envs, config.actor.unroll_length
    columns = trajectory_spec(spec, steps, config.actor.burn_in)
    slot, memory = columns.num_bytes(1), memory_bytes()
    if 3 * envs * slot + steps * ROW_BYTES > memory:
        largest = "env.num_envs" if envs > steps else "actor.unroll_length"
        return [
            f"{largest}: an unroll is {envs:,} slots (env.num_envs) x {steps:,} steps (actor.unroll_length) x "
            f"{slot / steps:,.0f} bytes = {_size(envs * slot)}, held three times (by the actor, as Arrow bytes, in the "
            f"batch), and {_size(steps * ROW_BYTES)} for its rows, more than the memory of {_size(memory)}; choose "
            "fewer slots or shorter unrolls"
        ]
    if (longest := columns.longest_column()) > MAX_COLUMN_LENGTH:
        return [
            f"actor.unroll_length: {steps:,} steps of a slot of {config.env.id} are {longest:,} numbers, more than the "
            f"{MAX_COLUMN_LENGTH:,} that a column of an Arrow record batch can hold; choose shorter unrolls"
        ]
    actors = 1 if layout is None else layout.num_actors
    batch = config.learner.batch_size if layout is None else layout.batch_size
    segments, acting = envs if batch == "auto" else batch, 2 * actors * envs
    total = (segments + acting) * slot + actors * steps * ROW_BYTES
    if total > memory:
        return [
            f"{_largest(config, segments, acting)}: a batch of {segments:,} segments, and the unrolls of {actors:,} "
            f"actors x {envs:,} slots, each held twice, are ({segments:,} + {acting:,}) x {steps:,} steps x "
            f"{slot / steps:,.0f} bytes; with the actors' rows that is {_size(total)}, more than the memory of "
            f"{_size(memory)}; choose a smaller batch, fewer actors or shorter unrolls"
        ]
    return []


def _largest(config: Config, segments: int, acting: int) -> str:
    """The setting from which most of the memory follows."""
    if segments > acting:
        return "learner.minibatches" if config.learner.batch_size == "auto" else "learner.batch_size"
    if config.actor.num_actors != "auto":
        return "actor.num_actors"
    return "actor.unroll_length" if config.learner.num_learners == "auto" else "learner.num_learners"


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB"
