"""Playing episodes with several policies, each of which plays its own agents of the same games."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shoal.actors.teams import TeamSetup
from shoal.deploy.evaluation.evaluate import (
    MAX_EPISODE_STEPS,
    RECORDED,
    Side,
    checkpoint_side,
    env_config,
    fitted_setup,
    keywords,
    play_sides,
    recording_stem,
    seeds,
    with_whole_games,
)
from shoal.deploy.evaluation.saved_run import check_saved_by_run, trained_arguments
from shoal.deploy.evaluation.table import Filmed, Played, policies_lines, policies_to_json
from shoal.envs.all_agents import AllAgents
from shoal.envs.config import AdapterOptions
from shoal.envs.play import Episodes, Player, play
from shoal.envs.raised import raised
from shoal.envs.recording import film
from shoal.envs.reference import random_player
from shoal.envs.teams import Patterns, TeamsEnvironment, make_team_specs
from shoal.learner.checkpoint import Checkpoint, CheckpointError
from shoal.policy.weights import Weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeamsSide:
    """Several policies and their way of playing; plain data that crosses to other processes."""

    setup: TeamSetup
    sides: Mapping[str, Side]
    """By policy; each with its own setup, weights and checkpoint."""
    agents: Mapping[str, tuple[int, ...]]
    """The indices of every policy's agents among those of a game."""

    def with_weights(self, weights: Mapping[str, Weights]) -> TeamsSide:
        """The same with other weights, by the name of the policy."""
        sides = {name: dataclasses.replace(side, weights=weights[name]) for name, side in self.sides.items()}
        return dataclasses.replace(self, sides=sides)

    def make(self, env_seed: np.random.SeedSequence, action_seed: np.random.SeedSequence) -> tuple[AllAgents, Player]:
        """The games of one block, and the player of all agents."""
        whole = self.setup.make_env(env_seed, whole_episodes=True)
        seeds = action_seed.spawn(len(self.sides))
        players = [
            side.make_player(whole.teams[name].spec, seed)
            for (name, side), seed in zip(self.sides.items(), seeds, strict=True)
        ]
        env = AllAgents(whole, players)
        return env, env.act

    def of_policies(self, played: Episodes) -> Episodes:
        """``played`` with the episodes of each policy."""
        return dataclasses.replace(
            played, policies={name: played.of_agents(agents) for name, agents in self.agents.items()}
        )


def teams_side(
    checkpoint: Checkpoint,
    *,
    num_envs: int | None,
    seed: int,
    greedy: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
    env_options: Mapping[str, Any] | None = None,
) -> TeamsSide:
    """The policies of a checkpoint, in the environment that they were trained in.

    Args:
        checkpoint: one of several policies.
        num_envs: slots of all agents; None takes as many as in training, or a few more where the games have another
            number of agents now.
        seed: of environments and actions.
        greedy: take the most probable actions instead of sampling.
        env_kwargs: arguments of the environment, added to those of training.
        env_options: fields of ``AdapterOptions`` that differ from training.

    Raises:
        ValueError: no run saved it, the environment cannot be made, or does not fit policies or slots.
    """
    for each in checkpoint.policies.values():
        check_saved_by_run(each)
    first = next(iter(checkpoint.policies.values()))
    config = first.state["config"]
    kwargs, options = trained_arguments(first)
    env = env_config(
        id=first.state["env_id"],
        num_envs=num_envs or config["env"]["num_envs"],
        kwargs={**kwargs, **(env_kwargs or {})},
        **{**dataclasses.asdict(options), **(env_options or {})},
    )
    try:
        patterns = {name: tuple(team["agents"]) for name, team in config["policies"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: its config does not say which agents are whose") from error
    if patterns.keys() != checkpoint.policies.keys():
        raise CheckpointError(f"{checkpoint.path}: its config names other policies than it holds")
    try:
        specs = make_team_specs(env.id, env.options, env.kwargs, patterns)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # other people's code: it raises anything
        raise ValueError(f"environment {env.id} cannot be made: {raised(error)}") from error
    num_agents = sum(len(group.agents) for group in specs.values())
    env = with_whole_games(env, num_agents, asked=num_envs is not None)
    games = env.num_envs // num_agents
    sides: dict[str, Side] = {}
    for name, group in specs.items():
        own = checkpoint.policies[name]
        fitted = fitted_setup(own, env, group.spec, seed=seed)
        setup = dataclasses.replace(fitted, num_envs=games * len(group.agents))
        sides[name] = checkpoint_side(own, setup, label=name, greedy=greedy)
    setups = {name: side.setup for name, side in sides.items()}
    return TeamsSide(
        setup=TeamSetup(agents=patterns, setups=setups),
        sides=sides,
        agents={name: group.indices for name, group in specs.items()},
    )


def unplayed_side(setup: TeamSetup, agents: Mapping[str, tuple[int, ...]], *, greedy: bool) -> TeamsSide:
    """The policies of a run, whose weights are still to come; ``agents`` as in ``TeamsSide``."""
    sides = {name: Side(label=name, setup=own, weights=None, greedy=greedy) for name, own in setup.setups.items()}
    return TeamsSide(setup=setup, sides=sides, agents=agents)


def play_teams(
    side: TeamsSide, episodes: int, processes: int | None = None, *, max_episode_steps: int = MAX_EPISODE_STEPS
) -> Episodes:
    """At least ``episodes`` episodes of all agents together, with those of each policy in ``policies``.

    Raises what ``evaluate.play_sides`` does.
    """
    (played,) = play_sides([side], episodes, processes, max_episode_steps=max_episode_steps)
    return side.of_policies(played)


class TeamsRecorder:
    """Films whole games of several policies, as ``evaluate.Recorder`` does of one."""

    def __init__(self, side: TeamsSide, directory: Path, max_episode_steps: int = MAX_EPISODE_STEPS) -> None:
        """Make the game.

        Raises:
            CannotRecord: it renders no pictures, or the directory or a package is missing.
        """
        self._side, self._max_episode_steps = side, max_episode_steps
        first = side.setup.first
        env_seed, _ = seeds(side.setup, RECORDED)
        version = max(each.weights.policy_version if each.weights else 0 for each in side.sides.values())
        self._env = film(
            first.env_id,
            env_seed,
            directory,
            recording_stem(version),
            first.env_kwargs,
            first.env_options,
            max_episode_steps,
            self._make,
        )

    def _make(self, options: AdapterOptions, kwargs: Mapping[str, Any]) -> AllAgents:
        """One game."""
        setups = {
            name: dataclasses.replace(
                own, env_options=options, env_kwargs=dict(kwargs), num_envs=len(self._side.agents[name])
            )
            for name, own in self._side.setup.setups.items()
        }
        alone = dataclasses.replace(self._side, setup=dataclasses.replace(self._side.setup, setups=setups))
        game, self._player = alone.make(*seeds(self._side.setup, RECORDED))
        return game

    def record(self, games: int) -> list[Filmed]:
        """Play so many games.

        Raises:
            EnvironmentFault: the game is beyond repair.
        """
        torch.set_num_threads(1)
        episodes = games * self._env.num_envs
        played = self._side.of_policies(
            play(self._env, self._player, episodes, max_episode_steps=self._max_episode_steps)
        )
        return [
            Filmed(
                file,
                {name: _mean(own.returns[own.number == game]) for name, own in played.policies.items()},
                int(played.lengths[played.number == game].max()),
            )
            for game, file in enumerate(self._env.files)
        ]

    def close(self) -> None:
        """Close the game."""
        self._env.close()


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def random_team_returns(
    env_id: str,
    patterns: Patterns,
    *,
    episodes: int,
    num_envs: int,
    max_env_steps: int,
    enough: Callable[[], bool],
    env_kwargs: Mapping[str, Any],
    options: AdapterOptions,
) -> dict[str, Episodes]:
    """What ``envs.reference.random_return`` is for one policy, for each of several: the episodes of its agents, in
    games in which the agents of all act at random, among their legal actions where masks say so."""
    seed = np.random.SeedSequence([0, 1])
    whole = TeamsEnvironment(env_id, num_envs, seed, options, False, env_kwargs, patterns)
    groups = whole.games.groups
    streams = np.random.default_rng([0, 2]).spawn(len(groups))
    env = AllAgents(whole, [random_player(each.spec, stream) for each, stream in zip(groups, streams, strict=True)])
    try:
        played = play(env, env.act, episodes, max_env_steps=max_env_steps, enough=enough)
    finally:
        env.close()
    # The first game's slots are the agents' places in a game.
    return {
        name: played.of_agents(group.slots[: group.spec.num_agents].tolist())
        for name, group in zip(patterns, groups, strict=True)
    }


def evaluate_teams(checkpoint: Checkpoint, options: argparse.Namespace, here: Path = Path()) -> str:
    """``shoal evaluate`` for a checkpoint of several policies: the returns of each, as it prints them. Films go to a
    directory below ``here``.

    Raises:
        ValueError: an option that is for one policy, or as ``teams_side``.
        EnvironmentFault: the games are beyond repair.
        JobFailed: the same in another process, or that process ended.
    """
    for name, given in {
        "--env": options.env,
        "--vs": options.vs,
        "--against": options.against,
        "--memory-horizon": options.memory_horizon is not None,
        "--zero-memory": options.zero_memory,
        "--replay": options.replay,
        "--map-feature": options.map_feature is not None,
        "--map-action": options.map_action is not None,
    }.items():
        if given:
            raise ValueError(
                f"{name}: is for one policy, and {options.run} has several, {', '.join(checkpoint.policies)}, which "
                "play together; leave it out"
            )
    side = teams_side(
        checkpoint,
        num_envs=options.num_envs,
        seed=options.seed,
        greedy=options.greedy,
        env_kwargs=keywords(options.env_kwargs, "--env-kwargs"),
        env_options=keywords(options.env_options, "--env-options"),
    )
    films: list[Filmed] = []
    if options.video is not None:
        recorder = TeamsRecorder(side, here / options.video, options.max_episode_steps)
        with contextlib.closing(recorder):
            films = recorder.record(options.recordings)
    played = play_teams(side, options.episodes, options.processes, max_episode_steps=options.max_episode_steps)
    found = {name: Played(side.sides[name], own) for name, own in played.policies.items()}
    if options.json:
        return json.dumps(policies_to_json(checkpoint, found, films))
    return "\n".join(policies_lines(found, films))
