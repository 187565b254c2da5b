"""Episodes that a trained policy plays, as a Minari dataset: what offline learning reads."""

# B slots, T steps of an episode

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluate import MAX_EPISODE_STEPS, checkpoint_side, evaluation_setup
from shoal.deploy.library.caller import process_state_kept
from shoal.deploy.library.exporting import CannotExport
from shoal.envs.boundary import EnvSpec, MaskedEnvironment, StepRows, TrialEnvironment, VectorEnvironment
from shoal.envs.gym import spec_to_make_again
from shoal.envs.play import play
from shoal.envs.readers import action_reader, observation_reader, other_keys
from shoal.envs.registry import is_of_gymnasium, make_env_spec
from shoal.learner.checkpoint import find_checkpoint

_RECORDED = 2**32 - 2
"""Spawn key of the random streams: of episodes that evaluation does not play."""


class MinariDataset(NamedTuple):
    """What was written."""

    dataset_id: str
    path: Path
    episodes: int
    steps: int
    mean_return: float


def export_minari(
    run_dir: str | Path,
    dataset_id: str,
    episodes: int = 100,
    *,
    greedy: bool = False,
    seed: int = 1,
    max_episode_steps: int = MAX_EPISODE_STEPS,
) -> MinariDataset:
    """Play episodes with the policy of a run, or of one of its checkpoints, and write them as a Minari dataset.

    An episode of T steps has T + 1 observations and T actions in the environment's own terms, rewards [T], and
    terminations and truncations [T]; its metadata name the slot and, where several share an environment, the agent.
    Numbers that the environment gives in float64 are those that the policy read, in float32. Where it tells which
    actions are legal, the masks are ``infos["action_mask"]`` bool [T + 1, A], the last of them all true. Images are not
    compressed. Minari keeps datasets in ``MINARI_DATASETS_PATH``.

    Args:
        run_dir: a run directory, or one of its checkpoints.
        dataset_id: as Minari names datasets, e.g. ``cartpole/shoal-v0``; it must be new.
        episodes: at least so many, one per agent; equally many of every slot.
        greedy: take the most probable action instead of sampling.
        seed: of environments and actions.
        max_episode_steps: an episode that has not ended after so many steps is truncated there.

    Raises:
        CheckpointError: there is no checkpoint.
        CannotExport: packages of ``shoal[minari]`` are missing, or Minari takes neither the name nor the spaces.
        ValueError: the environment cannot be made, or has other features or actions than in training.
        EnvironmentFault: the environment is beyond repair.
        OSError: the dataset cannot be written.
    """
    try:
        import minari  # noqa: F401  (only asked for here)
        from PIL import Image  # noqa: F401  (Minari's Arrow files need it)
    except ImportError as error:
        raise CannotExport(f"{error.name} is not installed: pip install 'shoal[minari]'") from error
    for name, number in {"episodes": episodes, "max_episode_steps": max_episode_steps}.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    folder = _new_folder(dataset_id)
    checkpoint = find_checkpoint(Path(run_dir))
    setup = evaluation_setup(checkpoint, num_envs=None, seed=seed)
    setup = dataclasses.replace(setup, num_envs=_slots(setup, episodes))
    side = checkpoint_side(checkpoint, setup, greedy=greedy)
    env_seed, action_seed = np.random.SeedSequence(seed, spawn_key=(_RECORDED,)).spawn(2)
    with process_state_kept(), contextlib.closing(setup.make_env(env_seed, whole_episodes=True)) as env:
        torch.set_num_threads(1)  # sums of several threads depend on their number
        dataset = _Dataset(
            dataset_id,
            env.spec,
            spec_to_make_again(setup.env_id, setup.env_options, setup.env_kwargs)
            if is_of_gymnasium(setup.env_id)
            else None,
            algorithm_name=f"shoal, {setup.policy_kind}",
            description=f"policy version {checkpoint.policy_version} in {setup.env_id}, {side.manner}, seed {seed}",
        )
        share = -(-episodes // env.num_envs)
        try:
            play(
                _RecordedEnvironment(env, share, max_episode_steps, dataset.add),
                side.make_player(env.spec, action_seed),
                share * env.num_envs,
                max_episode_steps=max_episode_steps,
                carries_memory=setup.carries_memory,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half of a dataset is none
            raise
    return MinariDataset(dataset_id, folder, len(dataset.returns), dataset.steps, float(np.mean(dataset.returns)))


class Episode(NamedTuple):
    """One agent's episode, as rows."""

    slot: int
    obs: np.ndarray
    """[T + 1, *obs_shape]"""
    action: np.ndarray
    """[T, *action_shape]"""
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    mask: np.ndarray | None
    """bool [T + 1, P]"""


class _Dataset:
    """Episodes on their way into Minari's files, each as it comes: together they may be more than fits into memory."""

    def __init__(self, dataset_id: str, spec: EnvSpec, gymnasiums: Any, **about: str) -> None:
        import minari

        observation_space, self._read_obs = observation_reader(spec)
        action_space, self._read_actions = action_reader(spec)
        if keys := other_keys(observation_space):
            raise CannotExport(f"Minari takes strings as keys of observations, there are {keys}")
        self._create = functools.partial(
            minari.create_dataset_from_buffers,
            dataset_id,
            env=gymnasiums,
            observation_space=observation_space,
            action_space=action_space,
            data_format="arrow",
            jpeg_encoding=False,
            **about,
        )
        self._num_agents = spec.num_agents
        self._storage: Any = None
        self.steps = 0
        self.returns: list[float] = []

    def add(self, episode: Episode) -> None:
        """Write an episode."""
        from minari.data_collector.episode_buffer import EpisodeBuffer

        buffer = EpisodeBuffer(
            observations=self._read_obs(episode.obs),
            actions=self._read_actions(episode.action),
            rewards=episode.reward.tolist(),
            terminations=episode.terminated.tolist(),
            truncations=episode.truncated.tolist(),
            infos=None if episode.mask is None else {"action_mask": episode.mask},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on authors and links that are not given
            if self._storage is None:
                self._storage = self._create([buffer]).storage
            else:
                self._storage.update_episodes([buffer])
        place = {"slot": episode.slot, "agent": episode.slot % self._num_agents}
        self._storage.update_episode_metadata([place], [len(self.returns)])
        self.steps += len(episode.reward)
        self.returns.append(float(episode.reward.sum()))


def _new_folder(dataset_id: str) -> Path:
    """Where Minari will keep the dataset.

    Raises:
        CannotExport: the name is malformed, or taken.
    """
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError) as error:  # the first where there is no version
        raise CannotExport(
            f"{dataset_id!r} names no Minari dataset: expected name-v0 or namespace/name-v0, of letters, digits, - and "
            "_; a namespace has at least two characters"
        ) from error
    folder = Path(get_dataset_path(dataset_id))
    if folder.exists():
        raise CannotExport(f"there is a dataset {dataset_id} in {folder} already: give another version")
    return folder


def _slots(setup: WorkerSetup, episodes: int) -> int:
    """As many as in training, but no more than episodes; whole environments."""
    agents = make_env_spec(setup.env_id, setup.env_options, **setup.env_kwargs).num_agents
    return min(setup.num_envs, -(-episodes // agents) * agents)


class _RecordedEnvironment:
    """An environment whose every slot hands over its first ``share`` episodes, each when it has ended.

    An episode that an environment's fault cuts off is not handed over; one of ``max_episode_steps`` is truncated there,
    as ``envs.play.play`` cuts it.
    """

    def __init__(
        self, env: VectorEnvironment, share: int, max_episode_steps: int, write: Callable[[Episode], None]
    ) -> None:
        self.spec, self.num_envs, self.short_episode, self.faults = (
            env.spec,
            env.num_envs,
            env.short_episode,
            env.faults,
        )
        self._env, self._most, self._write = env, max_episode_steps, write
        self._masked = env if env.spec.num_mask and isinstance(env, MaskedEnvironment) else None
        if self._masked is not None:
            self.action_mask = self._masked.action_mask
        if isinstance(env, TrialEnvironment):
            self.begins_anew, self.watch = env.begins_anew, env.watch
        self._left = [share] * env.num_envs
        self._steps: list[list[tuple[Any, ...]]] = [[] for _ in range(env.num_envs)]
        self._waits = [False] * env.num_envs
        """The slot's episode was cut; what follows of it is not recorded."""

    def reset(self, obs: np.ndarray) -> None:
        """Reset the environments; episodes that have not ended are dropped."""
        self._env.reset(obs)
        for slot in range(self.num_envs):
            self._begin(slot)

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Step the environments, from the observations in ``rows``."""
        before, full = rows.obs.copy(), ~self._env.short_episode
        masks = None if self._masked is None else self._masked.action_mask.astype(np.bool_)
        self._env.step(action, rows)
        ended = rows.terminated | rows.truncated
        for slot in range(self.num_envs):
            if rows.is_first[slot] and not ended[slot]:  # a step that only resets
                self._begin(slot)
                continue
            if not self._left[slot] or self._waits[slot]:
                self._waits[slot] &= not ended[slot]
                continue
            steps = self._steps[slot]
            is_cut = len(steps) + 1 == self._most and not ended[slot]
            steps.append(
                (
                    before[slot],
                    np.array(action[slot]),
                    rows.reward[slot],
                    rows.terminated[slot],
                    rows.truncated[slot] or is_cut,
                    None if masks is None else masks[slot],
                )
            )
            if is_cut or (ended[slot] and full[slot]):
                last = rows.obs if is_cut or rows.final_obs is None else rows.final_obs
                self._hand_over(slot, last[slot])
            if is_cut or ended[slot]:
                self._begin(slot)
                self._waits[slot] = is_cut

    def close(self) -> None:
        """Close the environments."""
        self._env.close()

    def _begin(self, slot: int) -> None:
        self._steps[slot], self._waits[slot] = [], False

    def _hand_over(self, slot: int, last: np.ndarray) -> None:
        obs, action, reward, terminated, truncated, masks = zip(*self._steps[slot], strict=True)
        self._left[slot] -= 1
        self._write(
            Episode(
                slot,
                np.stack([*obs, last]),
                np.stack(action),
                np.array(reward),
                np.array(terminated),
                np.array(truncated),
                None if self._masked is None else np.stack([*masks, np.ones_like(masks[0])]),
            )
        )
