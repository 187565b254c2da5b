"""Chooses the layout of a run from its settings and the machine: how many processes act and how many learn.

*colocated*: every learner also acts. Each has slots of its own, a part of every batch and one core; their gradients are
added up. All cores are busy whatever acting costs beside learning, and no trajectory leaves its process.
*disaggregated*: rollout processes feed the learner, or each of several. Right where learners have accelerators, or
environments wait.

The layout does not depend on ``mode``: inline mode runs the same parts one after the other in one process, which is
why it gives the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Literal

from shoal.deploy.settings.sections import Config

SMALLEST_BATCH = 32
"""Segments per update that ``auto`` does not go below."""
SMALLEST_COLOCATED_STEPS = 1024
"""Environment steps of one learner in one optimizer step below which its fixed costs are not worth having twice: one
learner with all of them, beside processes that act, is faster then (tests/bench/README.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The resources of a run."""

    cores: int
    """Cores of the machine that runs the learner of rank 0."""
    accelerator: bool
    """The learner has one."""
    actor_places: int | None = None
    """Rollout actors that a cluster has room for; None where there is only this machine."""
    actors_here: int = 0
    """The ``actor_places`` on this machine."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One process's part of the work."""

    actors: range
    """Rollout workers whose unrolls it trains."""
    batch_size: int
    """Segments per update."""
    num_shards: int
    first_shard: int
    num_threads: int
    """Gradient threads."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Placement, number of processes, and batch size of a run."""

    placement: Literal["colocated", "disaggregated"]
    why: str
    """The reason for the placement."""
    num_learners: int
    num_actors: int
    batch_size: int
    """Segments per update, summed over all learners."""
    num_threads: int
    """Gradient threads per learner."""
    cores: int

    def share(self, rank: int) -> Share:
        """The share of learner ``rank`` where each learner is a process of its own."""
        actors = self.num_actors // self.num_learners
        return Share(
            actors=range(rank * actors, (rank + 1) * actors),
            batch_size=self.batch_size // self.num_learners,
            num_shards=self.num_threads,
            first_shard=rank * self.num_threads,
            num_threads=self.num_threads,
        )

    def whole(self) -> Share:
        """The share of a single process that does all the work."""
        return Share(
            actors=range(self.num_actors),
            batch_size=self.batch_size,
            num_shards=self.num_learners * self.num_threads,
            first_shard=0,
            num_threads=self.num_threads,
        )


class LayoutError(ValueError):
    """Settings that cannot be met together; the message begins with the name of one."""


def unrolls_that_divide(minibatches: int, slots: Collection[int]) -> int:
    """The smallest number of unrolls whose rows every policy can divide into ``minibatches``.

    ``slots``: those of each policy's agents in one actor; with none, any numbers.
    """
    return math.lcm(*(minibatches // math.gcd(minibatches, own) for own in slots or (1,)))


def choose_layout(config: Config, machine: Machine, team_slots: Collection[int] = ()) -> Layout:
    """The layout of a run on what it has to work with.

    ``team_slots``: where several policies are trained, the slots of each one's agents in one actor. Without them
    batches are chosen that fit any agents.

    Raises:
        LayoutError: numbers that were set do not divide into each other.
    """
    layout = _choose(config, machine, team_slots)
    if config.self_play.share and layout.num_learners > 1:
        raise LayoutError(
            f"self_play.share: the pool of versions belongs to one learner, and there would be {layout.num_learners}; "
            "choose placement=disaggregated with learner.num_learners=1"
        )
    return layout


def _choose(config: Config, machine: Machine, team_slots: Collection[int]) -> Layout:
    placement, why = _placement(config, machine)
    if placement == "colocated":
        cores = machine.cores if machine.actor_places is None else 1 + machine.actor_places
        layout = _colocated(config, cores, why)
        if machine.accelerator and layout.num_learners > 1:
            raise LayoutError(
                f"placement: {layout.num_learners} learners that act on CPUs would leave their accelerators idle; "
                "choose placement=disaggregated or learner.device=cpu"
            )
        return layout
    return _disaggregated(config, machine, why, team_slots)


def _placement(config: Config, machine: Machine) -> tuple[Literal["colocated", "disaggregated"], str]:
    if config.placement != "auto":
        return config.placement, f"placement={config.placement}"
    if config.self_play.share and config.learner.num_learners == "auto":
        return "disaggregated", "self-play has one learner"
    if config.policies and config.learner.num_learners == "auto":
        return "disaggregated", "every policy has one learner"
    if config.learner.num_learners != "auto":
        acting = config.learner.num_learners > 1 and not machine.accelerator
        return "colocated" if acting else "disaggregated", f"learner.num_learners={config.learner.num_learners}"
    for name, value in (
        ("actor.num_actors", config.actor.num_actors),
        ("learner.num_threads", config.learner.num_threads),
    ):
        if value != "auto":
            return "disaggregated", f"{name} is set: rollout processes feed one learner"
    if machine.accelerator:
        return "disaggregated", "the learner has an accelerator"
    if machine.actor_places is not None:
        return "disaggregated", "a cluster's rollout actors come and go; learner.num_learners shares updates, too"
    cores = machine.cores
    if config.env.vectorization == "async":
        return "disaggregated", "the environments run in processes of their own, and acting waits for them"
    if cores > 1 and _num_learners(config, cores) < 2:
        return "disaggregated", (
            f"learner.batch_size={config.learner.batch_size} cannot be shared out equally among learners that act on "
            f"env.num_envs={config.env.num_envs} slots and make learner.minibatches={config.learner.minibatches} of it"
        )
    layout = _colocated(config, cores, "no accelerator: every core acts and learns")
    segments = layout.share(0).batch_size // config.learner.minibatches
    steps = segments * config.actor.unroll_length
    if cores > 1 and steps < SMALLEST_COLOCATED_STEPS:
        return "disaggregated", (
            f"{layout.num_learners} learners would have {steps} environment steps each in an optimizer step, too few "
            f"to be worth sharing (from {SMALLEST_COLOCATED_STEPS})"
        )
    return "colocated", layout.why


def _num_learners(config: Config, cores: int) -> int:
    """The largest number of learners, up to the cores, that divides batch and actors."""
    learner, actor, envs = config.learner, config.actor, config.env.num_envs
    if learner.num_learners != "auto":
        return learner.num_learners
    for number in range(cores, 1, -1):
        if learner.batch_size != "auto" and _share_problem(learner.batch_size, number, envs, learner.minibatches):
            continue
        if actor.num_actors != "auto" and actor.num_actors % number:
            continue
        return number
    return 1


def _share_problem(batch: int, learners: int, slots: int, minibatches: int) -> str | None:
    if batch % (learners * slots):
        return f"{batch} segments must be a multiple of {learners} learners x {slots} slots"
    if batch // learners % minibatches:
        return f"each learner's {batch // learners} segments must be a multiple of learner.minibatches={minibatches}"
    return None


def _colocated(config: Config, cores: int, why: str) -> Layout:
    learner, envs = config.learner, config.env.num_envs
    learners = _num_learners(config, cores)
    actors = learners if config.actor.num_actors == "auto" else config.actor.num_actors
    if actors % learners:
        raise LayoutError(
            f"actor.num_actors: {actors} must be a multiple of the {learners} learners that act (learner.num_learners)"
        )
    slots = actors // learners * envs
    if learner.batch_size == "auto":
        batch = _smallest_batch(actors * envs, multiple_of=learners * learner.minibatches)
    else:
        batch = learner.batch_size
        if problem := _share_problem(batch, learners, slots, learner.minibatches):
            raise LayoutError(f"learner.batch_size: {problem} (placement=colocated)")
    return Layout(
        placement="colocated",
        why=why,
        num_learners=learners,
        num_actors=actors,
        batch_size=batch,
        num_threads=1,
        cores=cores,
    )


def _disaggregated(config: Config, machine: Machine, why: str, team_slots: Collection[int]) -> Layout:
    learner, actor, envs = config.learner, config.actor, config.env.num_envs
    cores, accelerator, lag = machine.cores, machine.accelerator, actor.max_policy_lag
    learners = 1 if learner.num_learners == "auto" else learner.num_learners
    if actor.num_actors != "auto":
        actors = actor.num_actors
        if actors % learners:
            raise LayoutError(
                f"actor.num_actors: {actors} must be a multiple of learner.num_learners={learners}, so that every "
                "learner is fed by as many"
            )
    else:
        # With an accelerator all cores but one make rollouts. Without one acting and learning on a step cost about
        # the same.
        actors = machine.actor_places or max(1, cores - 1 if accelerator else cores // 2)
        actors = max(1, actors // learners) * learners
        if lag == 0 and learner.batch_size != "auto":
            # Lock step shares a batch equally: the largest number that divides it.
            unrolls = max(1, learner.batch_size // envs)
            shares = range(min(actors, unrolls) // learners, 0, -1)
            actors = next((n * learners for n in shares if unrolls % (n * learners) == 0), learners)
    if learner.batch_size == "auto":
        # So many that all actors may be under way within the lag.
        own = actors // learners
        unrolls = -(-own // lag) if lag else own
        # Of several policies each divides the rows of its own agents, as many in every unroll.
        divided = (
            unrolls_that_divide(learner.minibatches, team_slots) * envs if config.policies else learner.minibatches
        )
        batch = learners * _smallest_batch(unrolls * envs, multiple_of=divided)
    else:
        batch = learner.batch_size
        if learners > 1 and (problem := _share_problem(batch, learners, envs, learner.minibatches)):
            raise LayoutError(f"learner.batch_size: {problem}")
    if learner.num_threads != "auto":
        threads = learner.num_threads
    else:
        # More would fill the moments when an actor waits, but smaller shards cost more per step than that brings.
        acting_here = actors if machine.actor_places is None else machine.actors_here
        here = learners if machine.actor_places is None else 1
        threads = 1 if accelerator else max(1, (cores - acting_here) // here)
    return Layout(
        placement="disaggregated",
        why=why,
        num_learners=learners,
        num_actors=actors,
        batch_size=batch,
        num_threads=threads,
        cores=cores,
    )


def _smallest_batch(unrolls: int, *, multiple_of: int) -> int:
    """The smallest multiple of ``unrolls`` that is not too small and divides as it must."""
    step = math.lcm(unrolls, multiple_of)
    return -(-SMALLEST_BATCH // step) * step
