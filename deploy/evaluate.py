"""Playing episodes with a trained policy."""

from __future__ import annotations

import numpy as np
import torch

from actors.agent import WorkerSetup
from envs.config import EnvConfig
from envs.play import Returns, play
from learner.checkpoint import Checkpoint
from policy import FastPolicy


class PolicyPlayer:
    """A policy as a player of ``envs.play``: one memory per slot, sampled actions unless ``greedy``.

    ``zero_memory`` forgets before every step: how well does the policy play without its memory?
    """

    def __init__(self, policy: FastPolicy, *, seed: int, greedy: bool = False, zero_memory: bool = False) -> None:
        self._policy = policy.eval()
        self._greedy, self._zero_memory = greedy, zero_memory
        self._generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def __call__(self, obs: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """Action [B, ...] for obs [B, ...] and is_first bool [B]."""
        if self._zero_memory:
            self._policy.reset_memory()
        output = self._policy.act(torch.from_numpy(obs), range(len(obs)), torch.from_numpy(is_first))
        actions = self._policy.actions
        if self._greedy:
            return actions.mode(output.logits).numpy()
        uniform = 1 - torch.rand((len(obs), actions.num_uniform), generator=self._generator)
        return actions.sample(output.logits, uniform)[0].numpy()


def evaluation_setup(checkpoint: Checkpoint, *, num_envs: int | None, seed: int) -> WorkerSetup:
    """The environment and policy a checkpoint was trained with, to be played with ``num_envs`` slots.

    Raises:
        ValueError: the environment does not take so many slots.
    """
    policy, config = checkpoint.make_policy(), checkpoint.state["config"]
    env = EnvConfig(
        id=checkpoint.state["env_id"],
        num_envs=num_envs or config["env"]["num_envs"],
        kwargs=checkpoint.state["env_kwargs"],
    )
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
    )


def evaluate(
    checkpoint: Checkpoint,
    *,
    episodes: int,
    seed: int,
    num_envs: int | None = None,
    greedy: bool = False,
    zero_memory: bool = False,
) -> Returns:
    """At least ``episodes`` whole episodes of a checkpoint's policy (one per agent counts one).

    Raises:
        ValueError: the environment here is not the one it was trained in, or does not take so many slots.
    """
    env = evaluation_setup(checkpoint, num_envs=num_envs, seed=seed).make_env(np.random.SeedSequence(seed))
    player = PolicyPlayer(checkpoint.make_policy(), seed=seed, greedy=greedy, zero_memory=zero_memory)
    try:
        return play(env, player, episodes)
    finally:
        env.close()
