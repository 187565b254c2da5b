"""Playing episodes with a trained policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from actors.agent import WorkerSetup, actions_of, observation_of
from envs.config import EnvConfig
from envs.play import Returns, play
from envs.registry import make_env_spec
from learner.checkpoint import Checkpoint
from policy import RecurrentPolicy
from policy.remap import NameMap, Remapping, remap


class PolicyPlayer:
    """A policy as a player of ``envs.play``: one memory per slot, sampled actions unless ``greedy``.

    ``zero_memory`` forgets before every step: how well does the policy play without its memory?
    """

    def __init__(self, policy: RecurrentPolicy, *, seed: int, greedy: bool = False, zero_memory: bool = False) -> None:
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


def evaluation_setup(
    checkpoint: Checkpoint,
    *,
    num_envs: int | None,
    seed: int,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    remapping: Remapping | None = None,
) -> WorkerSetup:
    """The checkpoint's policy in an environment with ``num_envs`` slots, features and actions matched by name.

    Args:
        checkpoint: what to play.
        num_envs: None takes as many as it was trained with.
        seed: of environments and actions.
        env_id: None takes the environment it was trained in.
        env_kwargs: added to those it was trained with, where the environment is the same.
        remapping: what stands for what. None takes that of the run in its own environment, elsewhere an empty one.

    Raises:
        ValueError: the environment does not take so many slots, or has other features or actions (``policy.remap``).
    """
    state = checkpoint.state
    config = state["config"]
    if remapping is None:
        settings = config["policy"] if env_id is None else {}
        remapping = Remapping(
            NameMap(settings.get("map_features", ()), "--map-feature"),
            NameMap(settings.get("map_actions", ()), "--map-action"),
        )
    if not (env_id or state["env_id"]):
        raise ValueError(f"{checkpoint.path} was imported for no environment in particular; name one with --env")
    env = EnvConfig(
        id=env_id or state["env_id"],
        num_envs=num_envs or config["env"]["num_envs"],
        kwargs={**({} if env_id else state["env_kwargs"]), **(env_kwargs or {})},
    )
    spec = make_env_spec(env.id, **env.kwargs)
    presented = (observation_of(spec), actions_of(spec))
    interface = remap(state["policy"], *presented, remapping)
    return WorkerSetup(
        env_id=env.id,
        env_kwargs=env.kwargs,
        num_envs=env.num_envs,
        unroll_length=config["actor"]["unroll_length"],
        run_id="evaluation",
        seed=seed,
        observation=interface.observation,
        actions=interface.actions,
        policy_kind=state["policy"]["kind"],
        components=state["policy"].get("components") or {},
        embedding_rows=state["policy"]["embedding_rows"],
        action_rows=interface.action_rows,
        trained_observation=interface.trained_observation,
        presented=presented,
    )


def evaluate(
    checkpoint: Checkpoint, setup: WorkerSetup, *, episodes: int, greedy: bool = False, zero_memory: bool = False
) -> Returns:
    """At least ``episodes`` whole episodes of a checkpoint's policy (one per agent counts one), in the environment that
    ``evaluation_setup`` found it to fit.
    """
    policy = setup.make_policy()
    policy.load_state_dict(checkpoint.load_weights())
    env = setup.make_env(np.random.SeedSequence(setup.seed))
    player = PolicyPlayer(policy, seed=setup.seed, greedy=greedy, zero_memory=zero_memory)
    try:
        return play(env, player, episodes)
    finally:
        env.close()
