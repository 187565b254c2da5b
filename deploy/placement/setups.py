"""Makes the setups of rollout workers and learners from a configuration."""

from __future__ import annotations

import numpy as np
from shoal.actors.code import this_code
from shoal.actors.config import EPISODE
from shoal.actors.self_play import Games, divide_games
from shoal.actors.user_code import UserCode
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.placement.layout import Layout
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec
from shoal.policy.graph import components_to_json
from shoal.policy.remap import PolicyInterface


def make_worker_setup(
    config: Config, spec: EnvSpec, *, run_id: str, session: int = 0, interface: PolicyInterface | None = None
) -> WorkerSetup:
    """The setup of every rollout worker.

    Args:
        spec: the environment's observations, actions and agents.
        run_id: id of the run.
        session: number of times the run was resumed.
        interface: the names by which existing weights read the environment; None for fresh ones, which take its order.

    Raises:
        ValueError: the share of self-play's games cannot be met.
    """
    presented = (observation_of(spec), actions_of(spec))
    # Every session of a resumed run has random streams of its own.
    streams = np.random.SeedSequence(config.seed, spawn_key=(session,))
    return WorkerSetup(
        env_id=config.env.id,
        env_kwargs=config.env.kwargs,
        env_options=config.env.options,
        num_envs=config.env.num_envs,
        unroll_length=config.actor.unroll_length,
        run_id=f"{run_id}-{session}",
        seed=int(streams.generate_state(1, np.uint64)[0] >> 1),
        observation=interface.observation if interface else presented[0],
        actions=interface.actions if interface else presented[1],
        policy_kind=config.policy.kind,
        policy_kwargs=dict(config.policy.kwargs),
        core=config.policy.core,
        core_kwargs=dict(config.policy.core_kwargs),
        components=components_to_json(config.policy.components),
        embedding_rows=config.policy.embedding_rows,
        normalize_observations=config.policy.normalize_observations,
        normalize_values=config.learner.normalize_values,
        action_rows=interface.action_rows if interface else None,
        trained_observation=interface.trained_observation if interface else None,
        presented=presented,
        burn_in=config.actor.burn_in,
        reset_memory=config.actor.reset_memory,
        num_threads=config.actor.num_threads,
        user_code=UserCode.of(config.env.id, config.policy.kind, config.policy.core, config.learner.loss),
        games=games_of(config, spec),
        code=this_code(),
    )


def games_of(config: Config, spec: EnvSpec) -> Games | None:
    """The games of one actor; None without self-play.

    Raises:
        ValueError: the share of games cannot be met, or the memory is carried across games.
    """
    chosen = config.self_play
    if not chosen.share:
        return None
    if config.actor.reset_memory != EPISODE:
        raise ValueError(
            f"self_play.share={chosen.share:g} with actor.reset_memory={config.actor.reset_memory}: every game begins "
            "with other agents, whose memory is not carried on; leave one of the two out"
        )
    return divide_games(config.env.num_envs, spec.num_agents, chosen.share, chosen.versions_at_once)


def make_learner_setup(config: Config, layout: Layout, worker: WorkerSetup, spec: EnvSpec) -> LearnerSetup:
    """The setup of every learner."""
    return LearnerSetup(
        worker=worker,
        learner=config.learner,
        total_env_steps=config.total_env_steps,
        initialization=config.policy.initialization,
        env=spec,
        # A process that acts and learns alternately acts with the newest weights.
        max_policy_lag=0 if layout.placement == "colocated" else config.actor.max_policy_lag,
        max_consecutive_failures=1 if config.mode == "inline" else config.actor.max_consecutive_failures,
        seed=config.seed,
        self_play=config.self_play if config.self_play.share else None,
        in_turn=config.mode == "inline",
        recorder=config.recorder,
    )
