"""Makes the setups of rollout workers and learners from a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from shoal.actors.code import this_code
from shoal.actors.config import EPISODE
from shoal.actors.self_play import Games, divide_games
from shoal.actors.user_code import UserCode
from shoal.actors.worker_setup import WorkerSetup, actions_of, observation_of
from shoal.deploy.placement.layout import Layout, Share, unrolls_that_divide
from shoal.deploy.placement.learner_setup import LearnerSetup
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvSpec
from shoal.envs.config import EnvConfig
from shoal.envs.missions import nearest_slots
from shoal.envs.pettingzoo import GroupSpec
from shoal.envs.teams import make_team_specs
from shoal.learner.kl_adaptation import default_desired_kl
from shoal.learner.loss import default_clip_coef
from shoal.policy.actions import Actions
from shoal.policy.graph import components_to_json
from shoal.policy.observation import encoded_by
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
        observation=encoded_by(interface.observation if interface else presented[0], config.policy.image_encoder),
        actions=interface.actions if interface else presented[1],
        policy_kind=config.policy.kind,
        policy_kwargs=dict(config.policy.kwargs),
        core=config.policy.core,
        core_kwargs=dict(config.policy.core_kwargs),
        components=components_to_json(config.policy.components),
        embedding_rows=_embedding_rows(config, presented[1], interface),
        normalize_observations=config.policy.normalize_observations,
        normalize_values=config.learner.normalize_values,
        action_rows=interface.action_rows if interface else None,
        trained_observation=encoded_by(interface.trained_observation, config.policy.image_encoder)
        if interface
        else None,
        presented=presented,
        burn_in=config.actor.burn_in,
        reset_memory=config.actor.reset_memory,
        stagger_episodes=config.actor.stagger_episodes,
        num_threads=config.actor.num_threads,
        user_code=UserCode.of(
            config.env.id,
            config.policy.kind,
            config.policy.core,
            config.learner.loss,
            config.learner.optimizer,
            [str(schedule.kind) for schedule in config.learner.schedules.values()],
        ),
        games=games_of(config, spec),
        code=this_code(),
    )


_EMBEDDING_ROWS = 100
"""Of the original's table. More actions than these are as many rows."""


def _embedding_rows(config: Config, actions: Actions, interface: PolicyInterface | None) -> int:
    if config.policy.embedding_rows != "auto":
        return config.policy.embedding_rows
    return interface.embedding_rows if interface else max(_EMBEDDING_ROWS, len(actions.flat_names))


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
    # A process that acts and learns alternately acts with the newest weights.
    lag = 0 if layout.placement == "colocated" else config.actor.max_policy_lag
    learner = config.learner
    if learner.desired_kl == "auto":
        learner = dataclasses.replace(learner, desired_kl=default_desired_kl(worker.actions))
    if learner.clip_coef == "auto":
        behind = 0 if config.mode == "inline" else lag
        learner = dataclasses.replace(learner, clip_coef=default_clip_coef(learner.epochs, behind))
    return LearnerSetup(
        worker=worker,
        learner=learner,
        total_env_steps=config.total_env_steps,
        initialization=config.policy.initialization,
        env=spec,
        max_policy_lag=lag,
        max_consecutive_failures=1 if config.mode == "inline" else config.actor.max_consecutive_failures,
        seed=config.seed,
        self_play=config.self_play if config.self_play.share else None,
        in_turn=config.mode == "inline",
        recorder=config.recorder,
    )


_POLICIES = 1
"""First spawn key of the streams of policies; those of sessions have one key, their number."""


def patterns_of(config: Config) -> dict[str, tuple[str, ...]]:
    """The patterns of every policy's agents, where there are several."""
    return {name: tuple(team.agents) for name, team in config.policies.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeamShare:
    """One of several policies: its part of every game."""

    name: str
    number: int
    """Its place among the policies."""
    agents: tuple[int, ...]
    """The places of its agents among those of a game."""
    spec: EnvSpec
    num_slots: int
    """Slots of its agents in one actor."""
    share: float
    """Of all slots."""

    def setup(self, config: Config, layout: Layout, worker: WorkerSetup) -> LearnerSetup:
        """The setup of its learner, and of the rollout workers on its own slots."""
        own = dataclasses.replace(worker, num_envs=self.num_slots)
        return dataclasses.replace(
            make_learner_setup(config, layout, own, self.spec),
            policy=self.name,
            seed=self.seed(config.seed),
        )

    def target_env_steps(self, config: Config) -> int:
        """Its part of ``total_env_steps``; where agents leave games early, policies end with more and with fewer."""
        return max(1, round(config.total_env_steps * self.share))

    def seed(self, seed: int) -> int:
        """Of its weights and minibatches, from that of the run: the first policy's is the run's own.

        Policies of equal spaces begin with weights of their own, which no policy of a run with another seed has.
        """
        if not self.number:
            return seed
        streams = np.random.SeedSequence(seed, spawn_key=(_POLICIES, self.number))
        return int(streams.generate_state(1, np.uint64)[0] >> 1)

    def part(self, config: Config, layout: Layout) -> Share:
        """Its part of the run's only process."""
        whole = layout.whole()
        unrolls = whole.batch_size // config.env.num_envs
        return dataclasses.replace(whole, batch_size=unrolls * self.num_slots)


def check_slots(env: EnvConfig, num_agents: int) -> None:
    """Raise ValueError unless an actor's slots are whole games of ``num_agents``."""
    if env.num_envs % num_agents:
        nearest = nearest_slots(num_agents, env.num_envs)
        raise ValueError(
            f"env.num_envs: {env.num_envs} must be a multiple of the {num_agents} agents of {env.id}; set it to "
            f"{nearest}"
        )


def team_shares(
    config: Config, layout: Layout | None = None, agents: Mapping[str, GroupSpec] | None = None
) -> dict[str, TeamShare]:
    """Every policy of ``config.policies`` with its part of the games.

    Args:
        config: the settings.
        layout: None leaves the batches unchecked.
        agents: those of every policy where they are known; else the environment is made once for them.

    Raises:
        ValueError: agents and policies do not fit each other, or slots do not fit the agents; or as ``check_batches``.
    """
    env = config.env
    found = make_team_specs(env.id, env.options, env.kwargs, patterns_of(config)) if agents is None else agents
    num_agents = sum(len(group.agents) for group in found.values())
    check_slots(env, num_agents)
    games = env.num_envs // num_agents
    shares = {
        name: TeamShare(
            name=name,
            number=number,
            agents=group.indices,
            spec=group.spec,
            num_slots=games * len(group.agents),
            share=len(group.agents) / num_agents,
        )
        for number, (name, group) in enumerate(found.items())
    }
    if layout is not None:
        check_batches(config, layout, shares)
    return shares


def check_batches(config: Config, layout: Layout, shares: Mapping[str, TeamShare]) -> None:
    """Check that every policy can divide its part of each batch.

    Raises:
        ValueError: one cannot.
    """
    minibatches = config.learner.minibatches
    for name, own in shares.items():
        if (batch := own.part(config, layout).batch_size) % minibatches:
            unrolls = unrolls_that_divide(minibatches, [each.num_slots for each in shares.values()])
            raise ValueError(
                f"learner.minibatches: {minibatches} do not divide the {batch} segments that {name} has of each batch; "
                f"learner.batch_size={unrolls * config.env.num_envs} would do"
            )
