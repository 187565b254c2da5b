"""Playing episodes with a trained policy, or without one."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np

from actors.agent import WorkerSetup
from actors.rollout import RolloutWorker
from envs.config import EnvConfig
from learner.checkpoint import Checkpoint
from policy.trajectory import from_bytes
from policy.weights import Weights, flatten_weights

RANDOM_EPISODES = 256
RANDOM_ENV_STEPS = 60_000


@dataclasses.dataclass(frozen=True, slots=True)
class Returns:
    """Returns of finished episodes, one per agent."""

    values: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean return; NaN without episodes."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, as if episodes were independent."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def evaluation_setup(checkpoint: Checkpoint, *, num_envs: int, seed: int, action_selection: str) -> WorkerSetup:
    """A worker that plays a checkpoint in the environment it was trained in."""
    policy = checkpoint.make_policy()
    config = checkpoint.state["config"]
    env = EnvConfig(id=checkpoint.state["env_id"], num_envs=num_envs, kwargs=checkpoint.state["env_kwargs"])
    return WorkerSetup(
        env_id=env.id,
        env_kwargs=env.kwargs,
        num_envs=env.num_envs,
        unroll_length=config["actor"]["unroll_length"],
        run_id="evaluation",
        seed=seed,
        observation=policy.observation,
        actions=policy.actions,
        embedding_rows=policy.action_embeddings.num_embeddings,
        action_rows=policy.action_rows,
        action_selection=action_selection,
    )


def evaluate(
    checkpoint: Checkpoint,
    *,
    episodes: int,
    seed: int,
    num_envs: int | None = None,
    action_selection: Literal["sample", "mode"] = "sample",
    zero_memory: bool = False,
) -> Returns:
    """At least ``episodes`` episodes of a checkpoint's policy (one per agent counts one)."""
    slots = num_envs or checkpoint.state["config"]["env"]["num_envs"]
    setup = evaluation_setup(checkpoint, num_envs=slots, seed=seed, action_selection=action_selection)
    weights = flatten_weights(checkpoint.make_policy(), checkpoint.policy_version)
    worker = setup.make_worker(0, 0)
    try:
        return play(worker, weights, episodes=episodes, zero_memory=zero_memory)
    finally:
        worker.close()


def random_return(setup: WorkerSetup) -> float | None:
    """Mean return of uniformly random actions, measured; None where no episode ended in a short while."""
    worker = dataclasses.replace(setup, action_selection="random", run_id="random").make_worker(2**20, 0)
    try:
        weights = flatten_weights(worker.policy, 0)
        returns = play(worker, weights, episodes=RANDOM_EPISODES, max_env_steps=RANDOM_ENV_STEPS)
    finally:
        worker.close()
    return returns.mean if returns.values else None


def play(
    worker: RolloutWorker,
    weights: Weights,
    *,
    episodes: int,
    max_env_steps: int = 2**62,
    zero_memory: bool = False,
) -> Returns:
    """Roll out until ``episodes`` have ended.

    Every slot plays the same number of episodes before any is counted twice, so that short episodes, which end first, do
    not weigh more than long ones.
    """
    per_slot = -(-episodes // worker.envs.num_envs)
    values: list[list[float]] = [[] for _ in range(worker.envs.num_envs)]
    lengths: list[list[int]] = [[] for _ in range(worker.envs.num_envs)]
    env_steps = 0
    while min(map(len, values)) < per_slot and env_steps < max_env_steps:
        header = from_bytes(worker.spec, worker.rollout(weights, zero_memory=zero_memory)).header
        reported = header.statistics
        env_steps += reported["env_steps"]
        finished = zip(reported["episode_slots"], reported["episode_returns"], reported["episode_lengths"], strict=True)
        for slot, value, length in finished:
            values[slot].append(value)
            lengths[slot].append(length)
    flat = [
        (v, n)
        for vs, ns in zip(values, lengths, strict=True)
        for v, n in zip(vs[:per_slot], ns[:per_slot], strict=True)
    ]
    return Returns(tuple(v for v, _ in flat), tuple(n for _, n in flat))
