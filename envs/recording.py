"""Environments that record their episodes: videos of rendered frames, or MettaGrid's replays.

``film`` and ``replay`` make an environment for ``envs.play.play``; what it played lies in its ``files`` afterwards.
Both find out whether they can before anything is played.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from shoal.envs.boundary import MaskedEnvironment, StepRows, TrialEnvironment, VectorEnvironment
from shoal.envs.config import AdapterOptions, EnvironmentNotFound
from shoal.envs.missions import MISSIONS
from shoal.envs.raised import raised
from shoal.envs.registry import list_env_ids, make_env_spec, make_vector_env
from shoal.envs.writers import short

FRAMES_PER_SECOND = 30
"""Frames per second if an environment declares none."""
_PART = ".part.mp4"


class CannotRecord(ValueError):
    """The environment cannot be recorded, or a package or directory is missing."""


class RecordedEnvironment(VectorEnvironment, Protocol):
    """One environment, one slot per agent, that writes each episode to a file."""

    files: list[Path]
    """Files of the episodes that have ended, in order."""


class RenderedEnvironment(VectorEnvironment, Protocol):
    """A vector environment whose first environment can be asked for pictures."""

    def first_environment(self) -> Any:
        """The environment itself."""


Make = Callable[[AdapterOptions, Mapping[str, Any]], RenderedEnvironment]
"""(options, the environment's own arguments) -> one environment, with a slot for each of its agents."""


def film(
    env_id: str,
    seed: np.random.SeedSequence,
    directory: Path,
    stem: str,
    env_kwargs: Mapping[str, Any],
    options: AdapterOptions | None = None,
    max_episode_steps: int | None = None,
    make: Make | None = None,
) -> RecordedEnvironment:
    """One environment, whose episodes become ``DIRECTORY/STEM-0.mp4``, ``STEM-1.mp4``, ...; an episode that has not
    ended after ``max_episode_steps`` is cut there. ``make`` makes it where agents of different spaces play; None takes
    ``envs.registry``.

    Raises:
        CannotRecord: it does not render pictures, or a package or the directory is missing.
    """
    name = env_id.partition("?")[0]
    if name in MISSIONS or name.startswith("mettagrid:"):
        raise CannotRecord(f"--video: {name} renders no pictures; it writes replays for its own viewer: --replay DIR")
    if name in list_env_ids():
        raise CannotRecord(f"--video: {name} has nothing to show; environments of gymnasium and PettingZoo can")
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise CannotRecord(
            f"--video needs the package {error.name!r}, which is not installed: pip install 'shoal[video]'"
        ) from error
    try:
        rendering = _make_rendering(env_id, env_kwargs, options or AdapterOptions(), make or _maker(env_id, seed))
    except CannotRecord:
        raise
    except (Exception, SystemExit) as error:
        # Other people's code: what is missing for drawing is said by whatever it raises.
        why = str(error) if isinstance(error, EnvironmentNotFound) else raised(error)
        raise CannotRecord(f"--video: {env_id} cannot be rendered: {why}") from error
    _make_directory(directory, "--video")
    return _FilmedEnvironment(rendering(), directory / stem, imageio_ffmpeg.write_frames, max_episode_steps)


def replay(
    env_id: str,
    seed: np.random.SeedSequence,
    directory: Path,
    stem: str,
    env_kwargs: Mapping[str, Any],
    options: AdapterOptions | None = None,
    max_episode_steps: int | None = None,
) -> RecordedEnvironment:
    """One MettaGrid simulation, whose episodes become ``DIRECTORY/STEM-0.json.z``, ``STEM-1.json.z``, ...

    Raises:
        CannotRecord: it is another environment, or the directory is missing.
    """
    name = env_id.partition("?")[0]
    if name not in MISSIONS and not name.startswith("mettagrid:"):
        raise CannotRecord(
            f"--replay: {name} writes no replays, only MettaGrid's games do; an environment that renders pictures "
            "can be filmed: --video DIR"
        )
    from shoal.envs.mettagrid_game import mission_game, own_game
    from shoal.envs.mettagrid_replay import ReplayedMettaGrid

    _make_directory(directory, "--replay")
    own = name.startswith("mettagrid:")
    game = own_game(env_id, env_kwargs) if own else mission_game(MISSIONS[name])
    arguments = {"stagger": False, **({} if own else env_kwargs)}
    return ReplayedMettaGrid(game, seed, lambda k: directory / f"{stem}-{k}.json.z", **arguments)


def _maker(env_id: str, seed: np.random.SeedSequence) -> Make:
    def make(options: AdapterOptions, kwargs: Mapping[str, Any]) -> RenderedEnvironment:
        slots = make_env_spec(env_id, options, **kwargs).num_agents
        return cast(RenderedEnvironment, make_vector_env(env_id, slots, seed, options, True, **kwargs))

    return make


def _make_rendering(
    env_id: str, kwargs: Mapping[str, Any], options: AdapterOptions, make: Make
) -> Callable[[], RenderedEnvironment]:
    """Return the environment's factory after one instance has rendered a picture."""
    if options.vectorization == "native" and options.wrappers:
        raise CannotRecord(
            f"--video: {env_id} has wrappers of its native vector, and a video shows one environment: give wrappers of "
            "single environments that do the same, as --env-options vectorization=sync --env-options 'wrappers=[...]'"
        )
    # How several slots are stepped means nothing here: there is one environment.
    alone = AdapterOptions(
        wrappers=options.wrappers, image_layout=options.image_layout, reset_options=options.reset_options
    )
    with contextlib.closing(make(alone, kwargs)) as plain:
        modes = (plain.first_environment().metadata or {}).get("render_modes") or []
    if "rgb_array" not in modes:
        raise CannotRecord(
            f"--video: {env_id} does not render pictures: it has the render modes {', '.join(modes) or 'none'}, and "
            "rgb_array is needed"
        )
    rendering = functools.partial(make, alone, {**kwargs, "render_mode": "rgb_array"})
    with contextlib.closing(rendering()) as trial:
        trial.reset(np.empty((trial.num_envs, *trial.spec.obs_shape), trial.spec.obs_dtype))
        _picture(trial)
    return rendering


def _picture(env: RenderedEnvironment) -> np.ndarray:
    """uint8 [height, width, 3]; both even, as players of H.264 want them."""
    picture = env.first_environment().render()
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"render() answered {short(picture)}, must be uint8 [height, width, 3]")
    height, width, _ = picture.shape
    return np.ascontiguousarray(np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def _make_directory(directory: Path, option: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRecord(f"{option}: cannot write to {directory}: {os.strerror(error.errno or 0)}") from error
    if not os.access(directory, os.W_OK):
        raise CannotRecord(f"{option}: cannot write to {directory}: Permission denied")


class _FilmedEnvironment:
    """An environment in the next-step form, with a picture of every step."""

    def __init__(
        self,
        env: RenderedEnvironment,
        stem: Path,
        write_frames: Callable[..., Generator[None, Any, None]],
        max_episode_steps: int | None,
    ) -> None:
        self.spec, self.num_envs, self.short_episode = env.spec, env.num_envs, env.short_episode
        self.faults = env.faults
        if isinstance(env, MaskedEnvironment):
            self.action_mask = env.action_mask
        if isinstance(env, TrialEnvironment):
            self.begins_anew, self.watch = env.begins_anew, env.watch
        self.files: list[Path] = []
        self._env, self._stem, self._write_frames = env, stem, write_frames
        self._frames: Generator[None, Any, None] | None = None
        self._steps, self._most = 0, max_episode_steps
        metadata = env.first_environment().metadata
        self._frames_per_second = metadata.get("render_fps") or FRAMES_PER_SECOND

    def reset(self, obs: np.ndarray) -> None:
        """Reset the environment and start a new recording."""
        self._env.reset(obs)
        self._begin()

    def step(self, action: np.ndarray, rows: StepRows) -> None:
        """Step the environment and record its picture."""
        self._env.step(action, rows)
        ended = rows.terminated | rows.truncated
        if (rows.is_first & ~ended).all():
            # A new episode. If the previous one was cut off by a fault, its recording is discarded.
            self._begin()
            return
        if self._frames is None:  # cut, and what follows is not counted
            return
        self._frames.send(_picture(self._env))
        self._steps += 1
        if (ended.any() and (ended | rows.is_first).all()) or self._steps == self._most:
            self._stop()
            file = self._stem.with_name(f"{self._stem.name}-{len(self.files)}.mp4")
            os.replace(self._part, file)
            self.files.append(file)

    def close(self) -> None:
        """Close the environment; the recording of an unfinished episode is discarded."""
        self._stop()
        self._part.unlink(missing_ok=True)
        self._env.close()

    @property
    def _part(self) -> Path:
        return self._stem.with_name(self._stem.name + _PART)

    def _begin(self) -> None:
        self._stop()
        self._steps = 0
        picture = _picture(self._env)
        height, width, _ = picture.shape
        self._frames = self._write_frames(
            str(self._part), (width, height), fps=self._frames_per_second, macro_block_size=1, quality=7
        )
        self._frames.send(None)
        self._frames.send(picture)

    def _stop(self) -> None:
        frames, self._frames = self._frames, None
        if frames is not None:
            frames.close()
