"""Playing episodes with a trained policy, alone or against others in the same environments with the same seeds.

Who plays is a ``Side``. Its episodes come in blocks, each with environments and random streams of its own, so that
numbers do not depend on which process plays which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from shoal.actors.config import reset_key
from shoal.actors.teams import TeamSetup
from shoal.actors.user_code import UserCode
from shoal.actors.worker_setup import WorkerSetup, actions_of, no_infos, observation_of
from shoal.deploy.evaluation.job_process import run_jobs
from shoal.deploy.evaluation.saved_run import (
    check_plays_all,
    check_saved_by_run,
    own_remapping,
    remapping_of,
    reset_memory_of,
    trained_arguments,
)
from shoal.deploy.monitoring.intervals import Difference, difference
from shoal.envs.boundary import EnvSpec, VectorEnvironment
from shoal.envs.config import EnvConfig
from shoal.envs.missions import MISSIONS
from shoal.envs.play import Episodes, Player, join, play
from shoal.envs.raised import raised
from shoal.envs.recording import film, replay
from shoal.envs.reference import random_player
from shoal.envs.registry import make_env_spec
from shoal.learner.checkpoint import Checkpoint, CheckpointError, find_checkpoint, refusing_damage
from shoal.policy import RecurrentPolicy
from shoal.policy.actions import legal
from shoal.policy.graph import LSTM
from shoal.policy.remap import Remapping, remap
from shoal.policy.weights import Weights, flatten_weights, load_weights
from shoal.problems import Problems
from torch import Tensor

EPISODES_IN_A_ROW = 2
"""Episodes of each slot in a block: with more, less time is lost where some slots are done before others; with fewer,
more processes can take part."""
MOST_BLOCKS = 64
MAX_EPISODE_STEPS = 10_000
"""An episode that has not ended after so many steps is cut: some environments have no end."""
RECORDED = 2**32 - 1
"""Spawn key of the random streams of recorded episodes; blocks count from 0."""


class PolicyPlayer:
    """A policy as a player of ``envs.play``: one memory per slot, sampled actions unless ``greedy``.

    With ``memory_horizon`` k the memory is made anew before every step, from the k steps before it since ``is_first``:
    how far back does the policy remember what it needs? 0 plays without memory.
    """

    def __init__(
        self, policy: RecurrentPolicy, *, seed: int, greedy: bool = False, memory_horizon: int | None = None
    ) -> None:
        self._policy = policy.eval()
        self._greedy, self._horizon = greedy, memory_horizon
        self._generator = torch.Generator().manual_seed(seed)
        self._window: tuple[Tensor, Tensor] | None = None
        """obs [k + 1, B, ...] and is_first [k + 1, B] of the last steps, the newest last."""

    @torch.inference_mode()
    def __call__(self, obs: np.ndarray, is_first: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Action [B, ...] for obs [B, ...] and is_first bool [B], where the memory is zeroed; ``mask`` uint8 [B, P]
        tells the legal ones."""
        actions = self._policy.actions
        logits = legal(
            self._logits(torch.from_numpy(obs), torch.from_numpy(is_first)),
            None if mask is None else torch.from_numpy(mask.view(np.bool_)),
        )
        if self._greedy:
            return actions.mode(logits).numpy()
        uniform = 1 - torch.rand((len(obs), actions.num_uniform), generator=self._generator)
        return actions.sample(logits, uniform)[0].numpy()

    def _logits(self, obs: Tensor, is_first: Tensor) -> Tensor:
        """[B, A]"""
        if not self._horizon:
            if self._horizon == 0:
                self._policy.reset_memory()
            return self._policy.act(obs, range(len(obs)), is_first).logits
        if self._window is None:
            steps = self._horizon + 1
            self._window = obs.new_zeros((steps, *obs.shape)), torch.ones((steps, len(obs)), dtype=torch.bool)
        for rows, newest in zip(self._window, (obs, is_first), strict=True):
            rows[:-1] = rows[1:].clone()
            rows[-1] = newest
        # Zeros before the first row; what was before the last is_first does not reach beyond it.
        output, _ = self._policy.unroll(*self._window, return_state=False)
        return output.logits[-1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One policy and its way of playing; plain data that crosses to other processes."""

    label: str
    setup: WorkerSetup
    """Its ``seed`` determines environments and actions; equal ones give two sides the same of both."""
    weights: Weights | None
    """None: actions are uniformly random."""
    greedy: bool = False
    memory_horizon: int | None = None
    """As ``PolicyPlayer``'s."""
    checkpoint: Checkpoint | None = None
    """The checkpoint that the weights were loaded from, if any."""

    def with_weights(self, weights: Mapping[str, Weights]) -> Side:
        """The same with other weights, by the name of the policy, which is "" here."""
        return dataclasses.replace(self, weights=weights[""])

    @property
    def manner(self) -> str:
        """The choice of actions, in words."""
        if self.weights is None:
            return "uniformly random"
        manner = "greedy" if self.greedy else "sampled"
        if self.setup.carries_memory and self.memory_horizon != 0:
            key = reset_key(self.setup.reset_memory)
            until = "" if key is None else f" until info has {key}"
            manner += f", memory carried across episodes{until}"
        if self.memory_horizon is None:
            return manner
        if self.memory_horizon == 0:
            return f"{manner}, memory zeroed at every step"
        return f"{manner}, memory of {horizon_label(self.memory_horizon)}"

    def make(
        self, env_seed: np.random.SeedSequence, action_seed: np.random.SeedSequence
    ) -> tuple[VectorEnvironment, Player]:
        """The environments of one block, and their player."""
        env = self.setup.make_env(env_seed, whole_episodes=True)
        return env, self.make_player(env.spec, action_seed)

    def make_player(self, spec: EnvSpec, seed: np.random.SeedSequence) -> Player:
        """The player of one vector environment."""
        if self.weights is None:
            return random_player(spec, np.random.default_rng(seed))
        policy = self.setup.make_policy()
        load_weights(policy, self.weights)
        return PolicyPlayer(
            policy,
            seed=int(seed.generate_state(1, np.uint64)[0] >> 1),
            greedy=self.greedy,
            memory_horizon=self.memory_horizon,
        )


def horizon_label(steps: int) -> str:
    """A memory horizon in words."""
    if not steps:
        return "no step"
    return "the last step" if steps == 1 else f"the last {steps} steps"


class Playing(Protocol):
    """Who plays a block: a ``Side``, or several policies together (``deploy.evaluation.teams``)."""

    @property
    def setup(self) -> WorkerSetup | TeamSetup:
        """Makes the environments; its ``seed`` determines them and the actions."""

    def make(
        self, env_seed: np.random.SeedSequence, action_seed: np.random.SeedSequence
    ) -> tuple[VectorEnvironment, Player]:
        """The environments of one block, and their player."""


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A job: the episodes of some environments, ``rounds`` of every slot."""

    side: Playing
    index: int
    rounds: int
    max_episode_steps: int = MAX_EPISODE_STEPS

    def __call__(self) -> Episodes:
        """Play them.

        Raises:
            EnvironmentFault: the environments are beyond repair.
        """
        # Sums of several threads depend on their number.
        torch.set_num_threads(1)
        setup = self.side.setup
        env_seed, action_seed = seeds(setup, self.index)
        env, player = self.side.make(env_seed, action_seed)
        try:
            return play(
                env,
                player,
                self.rounds * env.num_envs,
                max_episode_steps=self.max_episode_steps,
                carries_memory=setup.carries_memory,
            )
        finally:
            env.close()


def seeds(setup: WorkerSetup | TeamSetup, key: int) -> list[np.random.SeedSequence]:
    """Seeds of the environments and of the actions."""
    return np.random.SeedSequence(setup.seed, spawn_key=(key,)).spawn(2)


def evaluation_setup(
    checkpoint: Checkpoint,
    *,
    num_envs: int | None,
    seed: int,
    env_id: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    env_options: Mapping[str, Any] | None = None,
    remapping: Remapping | None = None,
) -> WorkerSetup:
    """The checkpoint's policy in an environment with ``num_envs`` slots, features and actions matched by name.

    Args:
        checkpoint: what to play.
        num_envs: None takes as many as it was trained with, or a few more where the environment has another number of
            agents now.
        seed: of environments and actions.
        env_id: None takes the environment it was trained in.
        env_kwargs: arguments of the environment, added to those it was trained with where the environment is the same.
        env_options: fields of ``AdapterOptions`` that differ from those it was trained with.
        remapping: what stands for what. None takes that of the run in its own environment, elsewhere an empty one.

    Raises:
        ValueError: the environment cannot be made, does not take so many slots, or has other features or actions
            (``policy.remap``); or other agents of it have policies of their own.
    """
    check_saved_by_run(checkpoint)
    state = checkpoint.state
    config = state["config"]
    if env_id in (None, state["env_id"]):
        check_plays_all(checkpoint)
    if remapping is None:
        with refusing_damage(checkpoint.path, passed_on=ValueError):
            remapping = own_remapping(checkpoint) if env_id is None else remapping_of({})
    if not (env_id or state["env_id"]):
        raise ValueError(f"{checkpoint.path} was imported for no environment in particular; name one with --env")
    trained_kwargs, trained_options = trained_arguments(checkpoint)
    if env_id not in (None, state["env_id"]) and trained_options.vectorization == "native":
        # That vector is the other environment's own.
        trained_options = dataclasses.replace(trained_options, vectorization="sync")
    env = env_config(
        id=env_id or state["env_id"],
        num_envs=num_envs or _slots(config["env"]["num_envs"], env_id or state["env_id"]),
        kwargs={**({} if env_id else trained_kwargs), **(env_kwargs or {})},
        **{**dataclasses.asdict(trained_options), **(env_options or {})},
    )
    try:
        spec = make_env_spec(env.id, env.options, **env.kwargs)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # other people's code: it raises anything
        raise ValueError(f"environment {env.id} cannot be made: {raised(error)}") from error
    env = with_whole_games(env, spec.num_agents, asked=num_envs is not None)
    with refusing_damage(checkpoint.path, passed_on=ValueError):
        reset_memory = reset_memory_of(checkpoint)
        key = reset_key(reset_memory)
    if key is not None and spec.spaces is None:
        raise ValueError(no_infos(env.id, reset_memory))
    return fitted_setup(checkpoint, env, spec, seed=seed, remapping=remapping)


def env_config(**settings: Any) -> EnvConfig:
    """The settings of an environment.

    Raises:
        Problems: all of them.
    """
    try:
        return EnvConfig(**settings)
    except ValidationError as error:
        raise Problems(*(": ".join((*map(str, each["loc"][:1]), each["msg"])) for each in error.errors())) from error


def _slots(trained: int, env_id: str) -> int:
    """As many as in training, or a few more where a mission of MettaGrid has more agents than they make games of."""
    num_agents = MISSIONS[env_id].num_agents if env_id in MISSIONS else 1
    return -(-trained // num_agents) * num_agents


def with_whole_games(env: EnvConfig, num_agents: int, *, asked: bool) -> EnvConfig:
    """``env`` with slots for whole games of ``num_agents``: those that were ``asked`` for, else the next multiple.

    Raises:
        ValueError: they make no whole games.
    """
    games = -(-env.num_envs // num_agents)
    slots = games * num_agents
    if asked and slots != env.num_envs:
        fitting = " or ".join(str(n * num_agents) for n in (games - 1, games) if n)
        raise ValueError(
            f"--num-envs: {env.num_envs} slots must be a multiple of the {num_agents} agents of {env.id}; use {fitting}"
        )
    return dataclasses.replace(env, num_envs=slots)


def fitted_setup(
    checkpoint: Checkpoint, env: EnvConfig, spec: EnvSpec, *, seed: int, remapping: Remapping | None = None
) -> WorkerSetup:
    """The checkpoint's policy in the environment ``env``, which ``spec`` describes; the environment is not made.

    Raises:
        ValueError: it has other features or actions (``policy.remap``), or the checkpoint holds what no run saved.
    """
    with refusing_damage(checkpoint.path, passed_on=ValueError):
        return _fitted_setup(checkpoint, env, spec, seed, remapping)


def _fitted_setup(
    checkpoint: Checkpoint, env: EnvConfig, spec: EnvSpec, seed: int, remapping: Remapping | None
) -> WorkerSetup:
    state = checkpoint.state
    presented = (observation_of(spec), actions_of(spec))
    interface = remap(state["policy"], *presented, own_remapping(checkpoint) if remapping is None else remapping)
    return WorkerSetup(
        env_id=env.id,
        env_kwargs=env.kwargs,
        env_options=env.options,
        num_envs=env.num_envs,
        unroll_length=state["config"]["actor"]["unroll_length"],
        reset_memory=reset_memory_of(checkpoint),
        run_id="evaluation",
        seed=seed,
        observation=interface.observation,
        actions=interface.actions,
        policy_kind=state["policy"]["kind"],
        policy_kwargs=state["policy"].get("kwargs") or {},
        core=state["policy"].get("core", LSTM),
        core_kwargs=state["policy"].get("core_kwargs") or {},
        components=state["policy"].get("components") or {},
        embedding_rows=interface.embedding_rows,
        normalize_observations=state["policy"].get("normalize_observations", False),
        normalize_values=state["policy"].get("normalize_values", False),
        action_rows=interface.action_rows,
        trained_observation=interface.trained_observation,
        presented=presented,
        user_code=UserCode.of(env.id, state["policy"]["kind"], state["policy"].get("core", LSTM)),
    )


def checkpoint_side(
    checkpoint: Checkpoint,
    setup: WorkerSetup,
    *,
    label: str = "",
    greedy: bool = False,
    memory_horizon: int | None = None,
) -> Side:
    """A checkpoint's policy, in the environment that ``evaluation_setup`` found it to fit.

    Raises:
        ValueError: the policy cannot be made, or its weights are others.
    """
    with refusing_damage(checkpoint.path, passed_on=ValueError):
        with torch.random.fork_rng(devices=()):
            policy = setup.make_policy()
        policy.load_state_dict(checkpoint.load_weights())
    return Side(
        label=label or str(checkpoint.path),
        setup=setup,
        weights=flatten_weights(policy, checkpoint.policy_version),
        greedy=greedy,
        memory_horizon=memory_horizon,
        checkpoint=checkpoint,
    )


def opponent(
    word: str, side: Side, remapping: Remapping | None = None, *, here: Path = Path(), option: str = "--vs"
) -> Side:
    """Make the opponent of ``side``, in the same environments with the same seeds.

    Args:
        word: ``random``; ``greedy``, ``sampled`` or ``zero-memory`` for the same policy played in another way; else a
            run directory or a checkpoint, played in the way of ``side``.
        side: what it is compared with.
        remapping: for another checkpoint, as in ``evaluation_setup``.
        here: the directory that a relative path begins in, whatever the environment has made of the current one.
        option: that of the command line, for messages.

    Raises:
        ValueError: it is none of these, or does not fit the environment.
    """
    if word == "random":
        return dataclasses.replace(side, label=word, weights=None, checkpoint=None)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"greedy": True},
        "sampled": {"greedy": False},
        "zero-memory": {"memory_horizon": 0},
    }
    if word in ways:
        other = dataclasses.replace(side, label=word, **ways[word])
        if (other.greedy, other.memory_horizon) == (side.greedy, side.memory_horizon):
            raise ValueError(f"{option} {word}: {side.label} is played in that way already")
        return other
    try:
        checkpoint = find_checkpoint(here / word)
        setup = side.setup
        if remapping is None and checkpoint.state["env_id"] == setup.env_id:
            remapping = own_remapping(checkpoint)
        theirs = evaluation_setup(
            checkpoint,
            num_envs=setup.num_envs,
            seed=setup.seed,
            env_id=setup.env_id,
            env_kwargs=setup.env_kwargs,
            env_options=dataclasses.asdict(setup.env_options),
            remapping=remapping,
        )
        return checkpoint_side(checkpoint, theirs, label=word, greedy=side.greedy, memory_horizon=side.memory_horizon)
    except CheckpointError as error:
        words = "random, greedy, sampled and zero-memory" if option == "--vs" else "pool and random"
        raise ValueError(f"{option} {word}: {error} (or one of the words {words})") from error
    except ValueError as error:
        raise ValueError(f"{option} {word}: {error}") from error


def blocks(side: Playing, episodes: int, max_episode_steps: int = MAX_EPISODE_STEPS) -> list[Block]:
    """Jobs that play at least ``episodes`` of a side, as many in every slot of a block; one job where the memory is
    carried across the episodes of a slot."""
    rounds = -(-episodes // side.setup.num_envs)
    number = 1 if side.setup.carries_memory else min(MOST_BLOCKS, -(-rounds // EPISODES_IN_A_ROW))
    return [
        Block(side, index, rounds // number + (index < rounds % number), max_episode_steps) for index in range(number)
    ]


def play_sides(
    sides: Sequence[Playing],
    episodes: int,
    processes: int | None = None,
    *,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> list[Episodes]:
    """At least ``episodes`` episodes of each side (one per agent counts one), the same for any number of processes;
    None takes as many as pay. Episodes are whole, but for those that last longer than ``max_episode_steps``.

    Raises:
        EnvironmentFault: the environments of a side are beyond repair.
        JobFailed: the same in another process, or that process ended.
    """
    jobs = [blocks(side, episodes, max_episode_steps) for side in sides]
    played = iter(run_jobs([block for side in jobs for block in side], processes))
    return [join([next(played) for _ in side]) for side in jobs]


def evaluate(
    checkpoint: Checkpoint,
    setup: WorkerSetup,
    *,
    episodes: int,
    greedy: bool = False,
    memory_horizon: int | None = None,
    processes: int | None = 1,
) -> Episodes:
    """``play_sides`` for one checkpoint's policy, in the environment that ``evaluation_setup`` found it to fit."""
    side = checkpoint_side(checkpoint, setup, greedy=greedy, memory_horizon=memory_horizon)
    return play_sides([side], episodes, processes)[0]


def compare(a: Episodes, b: Episodes) -> Difference:
    """Mean return of ``a`` minus that of ``b``: paired where every two of their episodes began alike."""
    starts = a.starts(), b.starts()
    return difference(a.by_environment(a.returns), b.by_environment(b.returns), paired=bool(np.array_equal(*starts)))


def keywords(entries: Sequence[str], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` entries of a command's ``option`` as keyword arguments; a VALUE that is not JSON is a string.

    Raises:
        ValueError: an entry has another form.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not name or not equals:
            raise ValueError(f"{option}: {entry!r} must be of the form NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def recording_stem(version: int) -> str:
    """What the names of recordings begin with; ``shoal report`` finds films by it."""
    return f"version-{version:09d}-episode"


class Recorder:
    """Records whole episodes of one environment, played by one policy: ``kind`` is ``video`` or ``replay``."""

    def __init__(self, kind: str, side: Side, directory: Path, max_episode_steps: int = MAX_EPISODE_STEPS) -> None:
        """Make the environment.

        Raises:
            CannotRecord: it leaves nothing of this kind to look at, or the directory or a package is missing.
        """
        setup = side.setup
        env_seed, self._action_seed = seeds(setup, RECORDED)
        make = {"video": film, "replay": replay}[kind]
        stem = recording_stem(side.weights.policy_version if side.weights else 0)
        self._env = make(
            setup.env_id, env_seed, directory, stem, setup.env_kwargs, setup.env_options, max_episode_steps
        )
        setup.watch(self._env)
        self._side, self._max_episode_steps = side, max_episode_steps

    def record(self, episodes: int) -> tuple[list[Path], Episodes]:
        """Play so many episodes of the environment; the file of each, and what its agents earned.

        Raises:
            EnvironmentFault: the environment is beyond repair.
        """
        torch.set_num_threads(1)
        player = self._side.make_player(self._env.spec, self._action_seed)
        played = play(
            self._env,
            player,
            episodes * self._env.num_envs,
            max_episode_steps=self._max_episode_steps,
            carries_memory=self._side.setup.carries_memory,
        )
        return self._env.files, played

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
