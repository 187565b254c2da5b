"""Games of a trained policy against others: it plays one agent of each, and another policy all the rest.

Every agent's seat is played in equally many games. A game is won where the trained agent's return is higher than the
mean of the others, as in self-play.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluate import MAX_EPISODE_STEPS, Side, opponent, play_sides
from shoal.deploy.evaluation.table import columns, interval, mean_interval
from shoal.envs.boundary import VectorEnvironment
from shoal.envs.play import Episodes, Player, join
from shoal.envs.registry import make_env_spec
from shoal.learner.checkpoint import CheckpointError
from shoal.learner.opponents import read_versions

RESULTS = ("won", "drawn", "lost")


class SeatPlayer:
    """A player of ``envs.play``: ``own`` acts for the agent ``seat`` of every game, ``other`` for all of its others."""

    def __init__(self, own: Player, other: Player, seat: int, num_agents: int) -> None:
        self._own, self._other, self._seat, self._agents = own, other, seat, num_agents

    def __call__(self, obs: np.ndarray, is_first: np.ndarray, *masks: np.ndarray) -> np.ndarray:
        """Action [B, ...] for obs [B, ...], is_first bool [B], and where there is one a mask [B, P]."""
        is_own = np.arange(len(obs)) % self._agents == self._seat
        acts = [
            (slots, player(obs[slots], is_first[slots], *(mask[slots] for mask in masks)))
            for player, slots in ((self._own, is_own), (self._other, ~is_own))
        ]
        first = acts[0][1]
        actions = np.empty((len(obs), *first.shape[1:]), first.dtype)
        for slots, action in acts:
            actions[slots] = action
        return actions


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Games in which ``own`` has one seat and ``other`` the rest; plain data that crosses to other processes."""

    own: Side
    other: Side
    seat: int
    num_agents: int
    """Of a game."""

    @property
    def setup(self) -> WorkerSetup:
        """Makes the games; its ``seed`` determines them and the actions."""
        return self.own.setup

    def make(
        self, env_seed: np.random.SeedSequence, action_seed: np.random.SeedSequence
    ) -> tuple[VectorEnvironment, Player]:
        """The games of one block, and the player of all agents."""
        env = self.setup.make_env(env_seed, whole_episodes=True)
        players = [
            side.make_player(env.spec, seed)
            for side, seed in zip((self.own, self.other), action_seed.spawn(2), strict=True)
        ]
        return env, SeatPlayer(players[0], players[1], self.seat, self.num_agents)


def find_opponents(words: Sequence[str], side: Side, here: Path = Path()) -> dict[str, Side]:
    """Who plays against ``side``, by name.

    Args:
        words: ``pool`` is every version of the pool of self-play that ``side``'s checkpoint has, a number one of them;
            ``random``; else a run directory or a checkpoint.
        side: a checkpoint's.
        here: the directory that relative paths begin in.

    Raises:
        ValueError: a word is none of these, or names what does not fit the environment.
    """
    found: dict[str, Side] = {}
    for word in words:
        if word == "pool" or word.isdigit():
            versions = _pool(side, word)
            chosen = versions if word == "pool" else {name: each for name, each in versions.items() if name == word}
            if not chosen:
                raise ValueError(f"--against {word}: the pool has the versions {', '.join(versions)}")
            found |= {f"version {name}": each for name, each in chosen.items()}
        elif word in ("greedy", "sampled", "zero-memory"):
            raise ValueError(f"--against {word}: write pool, the number of a version, a run, a checkpoint, or random")
        else:
            found[word] = opponent(word, side, here=here, option="--against")
    return found


def _pool(side: Side, word: str) -> dict[str, Side]:
    checkpoint = side.checkpoint
    assert checkpoint is not None
    assert side.weights is not None
    if not checkpoint.has_opponents:
        raise ValueError(
            f"--against {word}: {checkpoint.path} has no pool of versions: it was trained without self_play.share; "
            "name another run or checkpoint"
        )
    try:
        # The policy's own weights have as many numbers as those that it met.
        versions = read_versions(checkpoint.load_opponents(), side.weights.flat.size)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"--against {word}: the pool of {checkpoint.path} cannot be played: {error}") from error
    return {str(each.policy_version): dataclasses.replace(side, weights=each, checkpoint=None) for each in versions}


def play_matches(
    side: Side,
    opponents: Mapping[str, Side],
    episodes: int,
    processes: int | None = None,
    *,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> dict[str, Episodes]:
    """The trained agent's episodes against each opponent, at least ``episodes`` of them, one per game.

    ``agent`` is the seat that was played; ``metrics`` has 0 or 1 for ``won``, ``drawn`` and ``lost``.

    Raises:
        ValueError: the environment has one agent.
        EnvironmentFault, JobFailed: as ``evaluate.play_sides``.
    """
    setup = side.setup
    num_agents = make_env_spec(setup.env_id, setup.env_options, **setup.env_kwargs).num_agents
    if num_agents < 2:
        raise ValueError(f"--against: games against another policy need several agents, {setup.env_id} has one")
    matches = [
        Match(own=side, other=other, seat=seat, num_agents=num_agents)
        for other in opponents.values()
        for seat in range(num_agents)
    ]
    of_a_seat = -(-episodes // num_agents)
    played = iter(play_sides(matches, of_a_seat * num_agents, processes, max_episode_steps=max_episode_steps))
    return {
        name: join([with_results(next(played), seat, num_agents) for seat in range(num_agents)]) for name in opponents
    }


def with_results(games: Episodes, seat: int, num_agents: int) -> Episodes:
    """The episodes of the agent ``seat`` alone, with the results of its games among their ``metrics``."""
    own = games.of_agents([seat])
    if not games.episodes:
        return own
    starts = (np.diff(games.environment, prepend=-1) != 0) | (np.diff(games.number, prepend=-1) != 0)
    begins, game = np.flatnonzero(starts), np.cumsum(starts) - 1
    mine = games.agent == seat
    returned = np.add.reduceat(np.where(mine, games.returns, 0.0), begins)
    others = (np.add.reduceat(games.returns, begins) - returned) / (num_agents - 1)
    difference = (returned - others)[game[mine]]
    results = (difference > 0, difference == 0, difference < 0)
    told = {name: result.astype(np.float64) for name, result in zip(RESULTS, results, strict=True)}
    return dataclasses.replace(own, metrics={**own.metrics, **told})


def evaluate_matches(side: Side, options: argparse.Namespace, here: Path) -> str:
    """``shoal evaluate --against``: what it prints. ``here`` is the directory that relative paths begin in.

    Raises:
        ValueError: an option that is not for this, or as ``find_opponents`` and ``play_matches``.
        EnvironmentFault, JobFailed: as ``evaluate.play_sides``.
    """
    others = {
        "--vs": bool(options.vs),
        "--memory-horizon": options.memory_horizon is not None,
        "--video": options.video is not None,
        "--replay": options.replay is not None,
    }
    for name, given in others.items():
        if given:
            raise ValueError(
                f"{name}: compares or records games that the policy plays alone; leave it out, or --against"
            )
    opponents = find_opponents(options.against, side, here)
    played = play_matches(
        side, opponents, options.episodes, options.processes, max_episode_steps=options.max_episode_steps
    )
    return json.dumps(to_json(side, opponents, played)) if options.json else "\n".join(lines(side, played))


def lines(side: Side, played: Mapping[str, Episodes]) -> list[str]:
    """A table with a row for every seat against every opponent."""
    version = side.weights.policy_version if side.weights else 0
    rows = []
    for name, episodes in played.items():
        for label, own in _by_seat(episodes).items():
            mean, half_width = mean_interval(own)
            shares = [f"{share:.0%}" for share in _shares(own).values()]
            counted = [f"{len(own.starts())}", *shares, f"{mean:.3f}", interval(mean, half_width, ".3f")]
            rows.append([f"{name}, {label}", *counted])
    said = [
        f"{side.setup.env_id}, policy version {version}, actions {side.manner}",
        f"  in every game one agent against the others, won with a return above their mean; seed {side.setup.seed}",
        "",
        *columns(["against", "games", *RESULTS, "return", "95% of the mean"], rows),
    ]
    cut = sum(int(episodes.cut.sum()) for episodes in played.values())
    return said + [f"  cut  {cut} games (--max-episode-steps)"] * bool(cut)


def to_json(side: Side, opponents: Mapping[str, Side], played: Mapping[str, Episodes]) -> dict[str, Any]:
    """One object of plain data; None for what there is no number for."""
    assert side.checkpoint is not None
    return {
        "checkpoint": str(side.checkpoint.path),
        "policy_version": side.checkpoint.policy_version,
        "env_id": side.setup.env_id,
        "seed": side.setup.seed,
        "actions": side.manner,
        "against": [
            {
                "opponent": name,
                "policy_version": weights.policy_version if (weights := opponents[name].weights) else None,
                "seats": {label: _numbers(own) for label, own in _by_seat(episodes).items()},
            }
            for name, episodes in played.items()
        ],
    }


def _by_seat(episodes: Episodes) -> dict[str, Episodes]:
    seats = np.unique(episodes.agent).tolist()
    return {**{f"seat {seat}": episodes.of_agents([seat]) for seat in seats}, "all seats": episodes}


def _shares(episodes: Episodes) -> dict[str, float]:
    return {name: float(episodes.by_environment(episodes.metrics[name]).mean()) for name in RESULTS}


def _numbers(episodes: Episodes) -> dict[str, Any]:
    mean, half_width = mean_interval(episodes)
    return {
        "games": len(episodes.starts()),
        **_shares(episodes),
        "mean_return": mean,
        "return_ci95": None if np.isnan(half_width) else half_width,
        "cut": int(episodes.cut.sum()),
    }
