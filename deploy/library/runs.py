"""Training and evaluation from Python, and the runs that they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.deploy.doctor import preflight
from shoal.deploy.evaluation.evaluate import MAX_EPISODE_STEPS, checkpoint_side, evaluation_setup, play_sides
from shoal.deploy.evaluation.matches import find_opponents, play_matches
from shoal.deploy.evaluation.teams import play_teams, teams_side
from shoal.deploy.library.acting import TrainedPolicy, load_policy
from shoal.deploy.library.caller import deliver, process_state_kept, warnings_shown
from shoal.deploy.library.config import Layer, make_config
from shoal.deploy.records.run_dir import CannotStart, new_run_dir
from shoal.deploy.settings.load import ConfigError
from shoal.deploy.settings.paths import with_absolute_paths
from shoal.deploy.training.callbacks import Callback
from shoal.deploy.training.run import run
from shoal.envs.play import Episodes, join
from shoal.learner.checkpoint import find_saved
from shoal.problems import problems_of


class Run:
    """A run directory.

    Args:
        run_dir: the directory.

    Raises:
        FileNotFoundError: there is no such directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir).absolute()
        if not self.run_dir.is_dir():
            raise FileNotFoundError(f"there is no run directory {self.run_dir}")

    def __repr__(self) -> str:
        return f"shoal.Run({str(self.run_dir)!r})"

    @property
    def summary(self) -> dict[str, Any]:
        """The run's result, as in RUN/summary.json: ``mean_return``, ``env_steps``, ``ledger`` and others.

        Of a run of several policies it has what is of all, as ``env_steps`` and ``ledger``, and under ``policies`` the
        summary of each by name: returns are of one policy, so ``mean_return`` is there.

        Raises:
            FileNotFoundError: the run has not ended yet.
        """
        path = self.run_dir / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.run_dir} has no summary.json: the run has not ended yet")
        summary: dict[str, Any] = json.loads(path.read_text())
        return summary

    @property
    def policy(self) -> TrainedPolicy:
        """The policy of the newest checkpoint, with an empty memory; every access loads it anew.

        Raises:
            CheckpointError: there is no checkpoint, or it holds several policies; the message says what to load.
        """
        return load_policy(self.run_dir)

    def evaluate(self, episodes: int = 64, **settings: Any) -> Episodes:
        """Play whole episodes with the newest checkpoint, as ``shoal.evaluate``."""
        return evaluate(self.run_dir, episodes, **settings)

    def report(self, out: str | Path | None = None) -> Path:
        """Write an HTML report of the run, as ``shoal report``, and return its path.

        Args:
            out: file of the page; None is RUN/report.html.

        Raises:
            CannotReport: nothing was recorded, or the packages of ``shoal[report]`` are not installed.
        """
        from shoal.deploy.report.command import write_report

        return Path(write_report([self.run_dir], None if out is None else Path(out)))


def train(
    env: str | Callable[..., Any] | Mapping[str, Any] | None = None,
    *,
    config: Layer = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a policy to the end, and return the run.

    ::

        run = shoal.train(env="CartPole-v1", total_env_steps=200_000)

    The interpreter is as before afterwards: random streams, torch's defaults, warnings, signal handlers. A Ray that the
    program has started is used, and left running; otherwise one is started where the mode needs it, and stopped. May be
    called from any thread, and any number of times.

    Args:
        env: an environment's id; a ``gymnasium.Env`` class; or a function that makes an environment, called with
            ``env.kwargs``. Classes and functions of a script or notebook reach the other processes, too.
        config: a ``shoal.Config``, a mapping as it takes, a YAML file, or the name of a shipped one.
        callbacks: called at the run's events, after those that the configuration names.
        progress: show progress and the result; False prints nothing.
        settings: any other setting, as ``shoal.Config`` takes it, over those of ``config``.

    Raises:
        ConfigError: a ``ValueError`` with all problems of the settings; nothing was started.
        CallbackFailed: a callback raised; the run is saved.
        RayLost: a ``RuntimeError``; Ray's head or raylet ended. The run is saved, and Ray is disconnected.
        KeyboardInterrupt: Ctrl-C, after the update was finished and a checkpoint saved. A second Ctrl-C does not wait
            for the update.
        Exception: whatever else ended the run; its summary is written all the same.
    """
    resolved = make_config(config, {} if env is None else {"env": env}, settings)
    run_dir = Path(resolved.run_dir or new_run_dir(resolved.env.id)).absolute()
    resolved = with_absolute_paths(resolved)
    with process_state_kept(), warnings_shown() if progress else contextlib.nullcontext():
        if problems := preflight.check(resolved, run_dir):
            raise ConfigError(problems)
        try:
            outcome = run(resolved, run_dir, callbacks=callbacks, quiet=not progress, owns_process=False)
        except CannotStart as error:
            raise ConfigError(problems_of(error)) from error
    if outcome.interrupted_by is not None:
        deliver(outcome.interrupted_by)
    return Run(run_dir)


def evaluate(
    run_dir: str | Path,
    episodes: int = 64,
    *,
    env: str | Callable[..., Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    env_options: Mapping[str, Any] | None = None,
    against: str | Path | int | None = None,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    greedy: bool = False,
    memory_horizon: int | None = None,
    seed: int = 1,
    num_envs: int | None = None,
    processes: int | None = None,
) -> Episodes:
    """Play whole episodes with a trained policy, as ``shoal evaluate``.

    Args:
        run_dir: a run directory, or one of its checkpoints.
        episodes: at least so many, one per agent; equally many in every slot.
        env: another environment than that of training, as ``shoal.train`` takes it; features and actions are matched by
            name.
        env_kwargs: arguments of the environment; without ``env`` they are added to those of training.
        env_options: settings of ``env`` that differ from training, e.g. ``{"wrappers": []}``.
        against: who plays all agents but one, in every seat in turn: ``"pool"`` (every version of self-play's pool), a
            version of it by its number, another run or checkpoint, or ``"random"``.
        max_episode_steps: an episode that has not ended after so many steps is cut there and counts as it is.
        greedy: take the most probable action instead of sampling.
        memory_horizon: play with a memory of the last so many steps, 0 without any; None is the whole memory.
        seed: of environments and actions.
        num_envs: slots stepped together; None takes as many as in training.
        processes: number of processes; None takes as many as make it faster. Results do not depend on it.

    Returns:
        The episodes: ``mean``, ``standard_error``, and ``returns``, ``lengths``, ``terminated`` [episodes]. Where the
        run trained several policies, which then play together, ``policies`` has those of each, by its name. With
        ``against``, those of the trained agent alone, one per game: ``agent`` is its seat, ``metrics`` has 0 or 1 for
        ``won``, ``drawn`` and ``lost``, and ``policies`` the same for each opponent, by its name.

    Raises:
        CheckpointError: there is no checkpoint.
        ValueError: the environment cannot be made, or has other features or actions; a policy class is missing; the
            policy is one of several; or ``env``, ``memory_horizon`` or ``against``, which are for one policy, are given
            where there are several; or ``against`` names nobody, or the environment has one agent.
        EnvironmentFault: the environment is beyond repair.
        JobFailed: the same in another process, or that process ended.
    """
    from shoal.actors.user_code import give_environment

    numbers = {"episodes": episodes, "num_envs": num_envs, "processes": processes}
    for name, number in (numbers | {"max_episode_steps": max_episode_steps}).items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if memory_horizon is not None and memory_horizon < 0:
        raise ValueError(f"memory_horizon={memory_horizon} must not be negative")
    here = Path.cwd()
    with process_state_kept():
        checkpoint = find_saved(Path(run_dir))
        if checkpoint.policies:
            for name, given in {"env": env, "memory_horizon": memory_horizon, "against": against}.items():
                if given is not None:
                    raise ValueError(
                        f"{name}: is for one policy, and {run_dir} has several, {', '.join(checkpoint.policies)}, "
                        "which play together; leave it out"
                    )
            return play_teams(
                teams_side(
                    checkpoint,
                    num_envs=num_envs,
                    seed=seed,
                    greedy=greedy,
                    env_kwargs=env_kwargs,
                    env_options=env_options,
                ),
                episodes,
                processes,
                max_episode_steps=max_episode_steps,
            )
        setup = evaluation_setup(
            checkpoint,
            num_envs=num_envs,
            seed=seed,
            env_id=env if env is None or isinstance(env, str) else give_environment(env),
            env_kwargs=env_kwargs,
            env_options=env_options,
        )
        side = checkpoint_side(checkpoint, setup, label=str(run_dir), greedy=greedy, memory_horizon=memory_horizon)
        if against is not None:
            others = find_opponents([str(against)], side, here)
            played = play_matches(side, others, episodes, processes, max_episode_steps=max_episode_steps)
            return dataclasses.replace(join(list(played.values())), policies=played)
        return play_sides([side], episodes, processes, max_episode_steps=max_episode_steps)[0]
