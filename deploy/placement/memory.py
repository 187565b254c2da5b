"""The memory that the trajectories of a run need, multiplied out before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shoal.actors.rollout import trajectory_spec
from shoal.deploy.placement.hardware import memory_bytes
from shoal.deploy.placement.layout import Layout
from shoal.deploy.placement.setups import games_of, make_worker_setup
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec
from shoal.learner.device_choice import device_name
from shoal.policy.weights import published_tensors

MAX_COLUMN_LENGTH = 2**31 - 1
"""Numbers that one slot can have in a column of an Arrow record batch."""
ROW_BYTES = 3000
"""Memory of a rollout worker's views of one row of its buffers, measured."""
LEARNED = 5
"""Copies of the weights that a learner has: they, their gradients, the optimizer's two moments, and w0."""
PUBLISHED = 1
"""Copies of the weights on their way to the actors."""


def check_memory(config: Config, shares: Sequence[tuple[EnvSpec, int]], layout: Layout | None) -> list[str]:
    """The problem of a run whose trajectories do not fit this machine; without one the update may still not fit.

    Every unroll is held in the buffers of its actor, as Arrow bytes, and in the learner's batch. The flight
    recorder has copies of the last batches, and self-play has frozen versions. The weights are in every actor, and with
    all that an update needs of them in the learner.

    Args:
        config: the settings of the run.
        shares: of every trained policy, what its agents see and do, and their slots in one actor.
        layout: the layout, if all actors are on this machine; None if it, or their place, is not known.
    """
    envs, steps = config.env.num_envs, config.actor.unroll_length
    columns = [trajectory_spec(spec, steps, config.actor.burn_in) for spec, _ in shares]
    own = [slots * each.num_bytes(1) for each, (_, slots) in zip(columns, shares, strict=True)]
    unroll, rows, memory = sum(own), len(shares) * steps * ROW_BYTES, memory_bytes()
    # That of one slot, where the policies' slots differ.
    mean = unroll / envs / steps
    if 3 * unroll + rows > memory:
        largest = "env.num_envs" if envs > steps else "actor.unroll_length"
        return [
            f"{largest}: an unroll is {envs:,} slots (env.num_envs) x {steps:,} steps (actor.unroll_length) x "
            f"{mean:,.0f} bytes = {_size(unroll)}, held three times (by the actor, as Arrow bytes, in the "
            f"batch), and {_size(rows)} for its rows, more than the memory of {_size(memory)}; choose "
            "fewer slots or shorter unrolls"
        ]
    if (longest := max(each.longest_column() for each in columns)) > MAX_COLUMN_LENGTH:
        return [
            f"actor.unroll_length: {steps:,} steps of a slot of {config.env.id} are {longest:,} numbers, more than the "
            f"{MAX_COLUMN_LENGTH:,} that a column of an Arrow record batch can hold; choose shorter unrolls"
        ]
    actors, learners = (1, 1) if layout is None else (layout.num_actors, layout.num_learners)
    batch = config.learner.batch_size if layout is None else layout.batch_size
    segments, acting = envs if batch == "auto" else batch, 2 * actors * envs
    total = (segments + acting) * unroll // envs + actors * rows
    weights = [weight_bytes(config, spec) for spec, _ in shares]
    # What is a CUDA device's is in its own memory.
    on_host = device_name(config.learner) != "cuda"
    copies = actors + PUBLISHED + (learners * LEARNED if on_host else 0)
    trained = copies * sum(weights)
    recorded = sum(
        recorder_bytes(config, segments * each // envs, learners, its) for each, its in zip(own, weights, strict=True)
    )
    recorded = recorded if on_host else 0
    frozen = frozen_bytes(config, shares[0][0], unroll // envs // steps, actors, weights[0])
    held = total, trained, recorded, frozen
    if sum(held) > memory:
        setting = _to_lower(config, segments, actors, held, sum(held) - memory)
        also = (
            (trained, f"{copies:,} copies of the weights (actors, gradients, moments, w0)"),
            (recorded, f"the flight recorder (recorder.keep_updates={config.recorder.keep_updates})"),
            (frozen, f"self-play's frozen versions (self_play.pool_size={config.self_play.pool_size})"),
        )
        more = "".join(f", with {what} {_size(size)} more" for size, what in also if size)
        return [
            f"{setting}: a batch of {segments:,} segments, and the unrolls of {actors:,} actors x {envs:,} slots, each "
            f"held twice, are ({segments:,} + {acting:,}) x {steps:,} steps x {mean:,.0f} bytes; with the "
            f"actors' rows that is {_size(total)}{more}, more than the memory of {_size(memory)}; choose a smaller "
            "batch, fewer actors, shorter unrolls or a smaller network"
        ]
    return []


def weight_bytes(config: Config, spec: EnvSpec) -> int:
    """Bytes of the policy's weights; 0 where none can be made, which is another problem's business."""
    try:
        with torch.random.fork_rng(devices=()):
            policy = make_worker_setup(config, spec, run_id="").make_policy()
    except (Exception, SystemExit):  # noqa: BLE001  (the user's code: it raises anything)
        return 0
    return sum(tensor.nbytes for tensor in published_tensors(policy).values())


def recorder_bytes(config: Config, batch: int, learners: int, weights: int) -> int:
    """Bytes that the flight recorders of all learners hold at most while updates go well.

    Each holds its last updates and the one under way, with its part of the ``batch`` bytes; that of rank 0 also
    ``weights``, the optimizer's two moments of them, and w0.
    """
    recorder, held = config.recorder, 0
    # w0 is counted with every update and copied once.
    for others, copied, w0 in ((1, batch // learners + 3 * weights, weights), (learners - 1, batch // learners, 0)):
        if recorder.keep_updates and copied + w0 <= recorder.max_bytes:
            kept = min(recorder.keep_updates, recorder.max_bytes // (copied + w0))
            held += others * ((kept + 1) * copied + w0)
    return held


def frozen_bytes(config: Config, spec: EnvSpec, row: int, actors: int, weights: int) -> int:
    """Bytes of self-play's frozen versions: ``weights`` in actors and in the pool, and slots with a ``row`` each."""
    games = games_of(config, spec)
    if games is None:
        return 0
    slots = games.num_slots - config.env.num_envs
    return actors * (games.versions_at_once * weights + slots * row) + config.self_play.pool_size * weights


def _to_lower(config: Config, segments: int, actors: int, held: tuple[int, int, int, int], lacking: int) -> str:
    """The setting of what need not be there, if the rest would fit; else the one from which most of it follows.

    ``held``: bytes of the trajectories, the weights, the flight recorder and self-play's versions; ``lacking``: bytes
    of these that are too many.
    """
    trajectories, weights, recorded, frozen = held
    if lacking <= recorded:
        return "recorder.keep_updates"
    if lacking <= frozen:
        return "self_play.pool_size"
    if weights > trajectories:
        return _processes(config, "policy") if actors > LEARNED else "policy"
    if segments > 2 * actors * config.env.num_envs:
        return "learner.minibatches" if config.learner.batch_size == "auto" else "learner.batch_size"
    return _processes(config, "actor.unroll_length")


def _processes(config: Config, otherwise: str) -> str:
    """The setting from which the number of actors follows, if it is one."""
    if config.actor.num_actors != "auto":
        return "actor.num_actors"
    return otherwise if config.learner.num_learners == "auto" else "learner.num_learners"


def _size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB"
