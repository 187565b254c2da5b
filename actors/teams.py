"""Rollout workers of several policies that play in the same games, one worker for each policy's agents.

The games are stepped once for all agents; every worker acts on its own rows, with the newest weights of its own policy,
and ships a trajectory of its own. No trajectory has a row of another policy's agents.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from shoal.actors.code import Code
from shoal.actors.rollout import RolloutWorker
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.envs.teams import TeamsEnvironment
from shoal.policy.weights import Weights


class TeamWorker:
    """The workers of one actor, in the order of the policies.

    Args:
        workers: each on a ``Team`` of the same ``TeamsEnvironment``.
        fetch: turns what a policy's weights came as into ``Weights``.
    """

    def __init__(self, workers: Sequence[RolloutWorker], fetch: Callable[[Any], Weights]) -> None:
        self.workers, self._fetch = tuple(workers), fetch

    def rollout(self, weights: Sequence[Any]) -> list[np.ndarray]:
        """One unroll of every worker, each with the weights of its policy: their trajectories as Arrow bytes.

        Raises what ``RolloutWorker.rollout`` does.
        """
        unrolls = [worker.unroll(self._fetch(newest)) for worker, newest in zip(self.workers, weights, strict=True)]
        left = [0.0] * len(unrolls)
        found: list[np.ndarray | None] = [None] * len(unrolls)
        try:
            while any(trajectory is None for trajectory in found):
                for index, unroll in enumerate(unrolls):
                    found[index] = unroll.send(time.perf_counter() - left[index] if left[index] else None)
                    left[index] = time.perf_counter()
        finally:
            for unroll in unrolls:
                unroll.close()
        return [trajectory for trajectory in found if trajectory is not None]

    def get_state(self) -> dict[str, Any]:
        """None of it: the games of a resumed run begin anew."""
        return {}

    def set_state(self, state: Any) -> dict[int, str]:
        """Every slot begins an episode, with the reason."""
        slots = sum(worker.envs.num_envs for worker in self.workers)
        return dict.fromkeys(range(slots), "several policies are trained, whose games begin anew")

    def close(self) -> None:
        """Close the games."""
        for worker in self.workers:
            worker.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeamSetup:
    """Everything that builds the workers of one actor, as plain data: it crosses to actor processes."""

    agents: Mapping[str, tuple[str, ...]]
    """Patterns of the names of every policy's agents (``envs.teams``)."""
    setups: Mapping[str, WorkerSetup]
    """By policy; ``num_envs`` of each are the slots of its own agents."""

    @property
    def first(self) -> WorkerSetup:
        """That of the first policy, for what all have in common."""
        return next(iter(self.setups.values()))

    @property
    def code(self) -> Code | None:
        """The learner's code; a process that runs other code raises."""
        return self.first.code

    @property
    def num_threads(self) -> int:
        """Torch threads of an actor's process."""
        return self.first.num_threads

    @property
    def num_envs(self) -> int:
        """Slots of all policies' agents."""
        return sum(setup.num_envs for setup in self.setups.values())

    @property
    def seed(self) -> int:
        """Everything random follows from it."""
        return self.first.seed

    @property
    def carries_memory(self) -> bool:
        """The memory of several policies ends with every game."""
        return False

    def make_env(self, seed: np.random.SeedSequence, *, whole_episodes: bool = False) -> TeamsEnvironment:
        """The games of one actor.

        Raises:
            ValueError: the environment here is not the one the run was set up with.
        """
        first = self.first
        env = TeamsEnvironment(
            first.env_id, self.num_envs, seed, first.env_options, whole_episodes, first.env_kwargs, self.agents
        )
        for name, team in env.teams.items():
            setup = self.setups[name]
            expected = setup.presented or (setup.observation, setup.actions)
            if (observation_of(team.spec), actions_of(team.spec)) != expected or team.num_envs != setup.num_envs:
                env.close()
                raise ValueError(
                    f"environment {first.env_id} here has {team.spec} for {name}, but the run was set up with "
                    f"{expected[0]} and {expected[1]}: are the same versions installed on every machine?"
                )
        return env

    def make_worker(
        self, actor: int, restart_index: int, fetch: Callable[[Any], Weights] = lambda weights: weights
    ) -> TeamWorker:
        """The workers of one actor; every (actor, restart index) has random streams of its own."""
        streams = np.random.SeedSequence(self.first.seed, spawn_key=(actor, restart_index))
        env_seed, *action_seeds = streams.spawn(1 + len(self.setups))
        env = self.make_env(env_seed)
        workers = []
        try:
            for (name, setup), seed in zip(self.setups.items(), action_seeds, strict=True):
                with torch.random.fork_rng(devices=()):
                    policy = setup.make_policy()
                workers.append(
                    RolloutWorker(
                        env.teams[name],
                        policy,
                        setup.unroll_length,
                        run_id=setup.run_id,
                        actor=actor,
                        restart_index=restart_index,
                        seed=int(seed.generate_state(1, np.uint64)[0] >> 1),
                        burn_in=setup.burn_in,
                    )
                )
        except BaseException:
            env.close()
            raise
        return TeamWorker(workers, fetch)
