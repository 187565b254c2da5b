"""Builds rollout workers: translates an environment's description of itself into the policy's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from shoal.actors.code import Code
from shoal.actors.config import EPISODE, reset_key
from shoal.actors.rollout import RolloutWorker
from shoal.actors.self_play import Games, SelfPlayEnvironment
from shoal.actors.user_code import UserCode
from shoal.envs.boundary import (
    DictSpace,
    DiscreteActions,
    EnvSpec,
    ImageSpace,
    StaggeredEnvironment,
    TokenSpace,
    TrialEnvironment,
    VectorEnvironment,
    VectorSpace,
)
from shoal.envs.config import AdapterOptions
from shoal.envs.registry import make_vector_env
from shoal.policy.actions import Actions, Continuous, Discrete
from shoal.policy.config import Initialization
from shoal.policy.graph import LSTM
from shoal.policy.make import make_policy
from shoal.policy.observation import (
    DictObservation,
    ImageObservation,
    Observation,
    TokenObservation,
    VectorObservation,
)
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.weights import Weights

STAGGER = 3
"""Number of the random stream of ``stagger_episodes``, after those of environment, actions and self-play."""
Fetch = Callable[[Any], Weights]
"""Turns ``Opponent.weights`` into ``Weights``."""


def observation_of(spec: EnvSpec) -> Observation:
    """The policy's description of the environment's observations."""
    space = spec.observation
    if isinstance(space, TokenSpace):
        categorical = {feature for feature, _ in space.categorical_features}
        # A feature without a name does not occur, a categorical one has planes for its values: neither needs one more.
        norms = [
            None if i in categorical or not name else norm
            for i, (name, norm) in enumerate(zip(space.feature_names, space.feature_normalizations, strict=True))
        ]
        return TokenObservation(
            space.width,
            space.height,
            space.num_tokens,
            norms,
            space.feature_names,
            space.categorical_features,
            space.global_coordinate,
        )
    if isinstance(space, ImageSpace):
        return _image(space)
    if isinstance(space, DictSpace):
        images = [(name, _image(image)) for name, image in space.images]
        return DictObservation(_vector(space.numbers), images)
    return _vector(space)


def _vector(space: VectorSpace) -> VectorObservation:
    return VectorObservation(space.size, space.names or None, space.categorical, space.stored)


def _image(space: ImageSpace) -> ImageObservation:
    return ImageObservation(space.height, space.width, space.channels, space.dtype, space.scale)


def actions_of(spec: EnvSpec) -> Actions:
    """The policy's description of the environment's actions."""
    if isinstance(spec.actions, DiscreteActions):
        return Discrete(spec.actions.names, spec.actions.scalar)
    return Continuous(spec.actions.names)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSetup:
    """Everything that builds a rollout worker, as plain data: it crosses to actor processes."""

    env_id: str
    env_kwargs: dict[str, Any]
    """The environment's own arguments."""
    num_envs: int
    unroll_length: int
    run_id: str
    seed: int
    observation: Observation
    """Observations of the environment, in the policy's names."""
    actions: Actions
    """Actions of the environment, in the policy's names."""
    env_options: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    """How the environment is made, stepped and read."""
    policy_kind: str = "fast"
    policy_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of a policy class of the user's (``policy.kwargs``)."""
    core: str = LSTM
    core_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    components: dict[str, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    """Differences from the default graph (``policy.graph.components_to_json``)."""
    embedding_rows: int = 100
    normalize_observations: bool = False
    normalize_values: bool = False
    action_rows: dict[str, int] | None = None
    trained_observation: TokenObservation | VectorObservation | DictObservation | None = None
    """The observation that the weights were made for, where it is not ``observation``."""
    presented: tuple[Observation, Actions] | None = None
    """Observation and actions in the environment's own names; None where these are the policy's."""
    burn_in: int = 0
    reset_memory: str = EPISODE
    """``actor.reset_memory``."""
    stagger_episodes: bool = False
    """``actor.stagger_episodes``."""
    num_threads: int = 1
    user_code: UserCode = dataclasses.field(default_factory=UserCode)
    """What ``env_id``, ``policy_kind`` and ``core`` name, where no import finds it."""
    games: Games | None = None
    """The games of one actor, of whose agents ``num_envs`` are trained; None without self-play."""
    code: Code | None = None
    """The learner's code; a process that runs other code raises."""

    @property
    def carries_memory(self) -> bool:
        """Whether the memory goes on across episodes."""
        return self.reset_memory != EPISODE

    def make_policy(self, initialization: Initialization | None = None) -> RecurrentPolicy:
        """A policy with fresh weights."""
        return make_policy(
            self.policy_kind,
            self.observation,
            self.actions,
            self.embedding_rows,
            components=self.components,
            kwargs=self.policy_kwargs,
            core=self.core,
            core_kwargs=self.core_kwargs,
            action_rows=self.action_rows,
            initialization=initialization,
            trained_observation=self.trained_observation,
            normalize_observations=self.normalize_observations,
            normalize_values=self.normalize_values,
        )

    def make_env(self, seed: np.random.SeedSequence, *, whole_episodes: bool = False) -> VectorEnvironment:
        """The environment of one worker; with ``whole_episodes`` as evaluation plays it (``envs.registry``).

        Raises:
            ValueError: the environment here is not the one the run was set up with.
        """
        env = make_vector_env(self.env_id, self.num_envs, seed, self.env_options, whole_episodes, **self.env_kwargs)
        expected = self.presented or (self.observation, self.actions)
        if (observation_of(env.spec), actions_of(env.spec)) != expected:
            env.close()
            raise ValueError(
                f"environment {self.env_id} here has {env.spec}, but the run was set up with {expected[0]} and "
                f"{expected[1]}: are the same versions installed on every machine?"
            )
        try:
            self.watch(env)
        except ValueError:
            env.close()
            raise
        return env

    def watch(self, env: VectorEnvironment) -> None:
        """Have the environment look for the key of ``info:KEY``; before its first reset.

        Raises:
            ValueError: it reports no infos.
        """
        key = reset_key(self.reset_memory)
        if key is None:
            return
        if not isinstance(env, TrialEnvironment):
            raise ValueError(no_infos(self.env_id, self.reset_memory))
        env.watch(key)

    def make_worker(self, actor: int, restart_index: int, fetch: Fetch = lambda weights: weights) -> RolloutWorker:
        """The worker of one actor; every (actor, restart index) has random streams of its own."""
        # Spawn keys rather than offsets: seeds of different slots, actors and restart indices never overlap.
        streams = np.random.SeedSequence(self.seed, spawn_key=(actor, restart_index))
        env_seed, action_seed = streams.spawn(2)
        with torch.random.fork_rng():
            policy = self.make_policy()
        env = self.make_env(env_seed) if self.games is None else self._make_games(self.games, env_seed, streams, fetch)
        # Where the memory is carried, trials of several episodes begin with the first.
        if self.stagger_episodes and not self.carries_memory and isinstance(env, StaggeredEnvironment):
            env.stagger(np.random.SeedSequence(self.seed, spawn_key=(actor, restart_index, STAGGER)))
        return RolloutWorker(
            env,
            policy,
            self.unroll_length,
            run_id=self.run_id,
            actor=actor,
            restart_index=restart_index,
            seed=int(action_seed.generate_state(1, np.uint64)[0] >> 1),
            burn_in=self.burn_in,
            reset_memory=self.reset_memory,
        )

    def _make_games(
        self, games: Games, env_seed: np.random.SeedSequence, streams: np.random.SeedSequence, fetch: Fetch
    ) -> SelfPlayEnvironment:
        env = dataclasses.replace(self, num_envs=games.num_slots).make_env(env_seed)
        (seed,) = streams.spawn(1)
        with torch.random.fork_rng():
            return SelfPlayEnvironment(env, games, self.make_policy, fetch, seed)


def no_infos(env_id: str, reset_memory: str) -> str:
    """The sentence for an environment of ours with ``info:KEY``."""
    return (
        f"{env_id} reports no infos, so {reset_memory} never comes; environments of gymnasium and PettingZoo do. Set "
        "actor.reset_memory to episode or never"
    )
