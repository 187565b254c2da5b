"""Evaluation during training: whole episodes with the newest weights, in a process of its own.

A thread looks now and then whether one is due, and hands the weights that were published last to the process. The
training loop does nothing for it and waits for nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluate import Side, play_sides
from shoal.deploy.evaluation.job_process import JobFailed
from shoal.deploy.monitoring.intervals import confidence_interval
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations, sentence
from shoal.deploy.settings.sections import EvaluationConfig
from shoal.envs.config import AdapterOptions
from shoal.envs.play import Episodes
from shoal.learner.checkpoint import CheckpointError, Checkpoints
from shoal.policy.weights import Weights

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_STREAM = 2**32 - 2
"""Spawn key of the random streams of evaluation; the sessions of a run count from 0."""


class Jobs(Protocol):
    """Does one job at a time: ``deploy.evaluation.job_process`` or ``deploy.evaluation.ray_jobs``.

    All methods may raise ``JobFailed``, except those that end jobs.
    """

    def submit(self, job: Callable[[], Any]) -> None:
        """Hand over a job."""

    def poll(self, seconds: float) -> bool:
        """Wait at most ``seconds``; True if the job is done."""

    def result(self) -> Any:
        """The return value of the job."""

    def end(self) -> None:
        """Give up the job; the next one is done all the same."""

    def kill(self) -> None:
        """End everything at once, from any thread; there is no next one."""


def in_one_process(options: AdapterOptions) -> AdapterOptions:
    """The options without those that spread slots over processes: one is enough beside those that train."""
    if options.vectorization != "async":
        return options
    return dataclasses.replace(options, vectorization="sync", slot_groups="auto")


def training_side(setup: WorkerSetup, config: EvaluationConfig, *, num_agents: int, seed: int) -> Side:
    """A run's own policy without its weights, to be evaluated every time with the same seeds, so that evaluations
    differ by their weights alone. ``num_agents`` share an environment.
    """
    stream = np.random.SeedSequence(seed, spawn_key=(_STREAM,)).generate_state(1, np.uint64)[0]
    options = in_one_process(setup.env_options)
    num_envs = min(setup.num_envs, -(-config.episodes // num_agents) * num_agents)
    return Side(
        label="evaluation",
        setup=dataclasses.replace(setup, env_options=options, num_envs=num_envs, seed=int(stream >> 1)),
        weights=None,
        greedy=config.greedy,
    )


def _play(side: Side, episodes: int, niceness: int) -> Episodes:
    # Not before: at a low priority a process may take minutes to import what it needs.
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    return play_sides([side], episodes, processes=1)[0]


class Evaluator:
    """The thread; leaving its block ends an evaluation that is under way at once."""

    def __init__(
        self,
        config: EvaluationConfig,
        side: Side,
        jobs: Jobs,
        evaluations: Evaluations,
        *,
        session: int,
        newest: Callable[[], Weights | None],
        env_steps: Callable[[], int],
        describe: Callable[[], Mapping[str, Any]],
        keep_best: Callable[[Weights, Mapping[str, Any]], object] | None,
    ) -> None:
        """Prepare.

        Args:
            config: when and how.
            side: policy and way of playing, without the weights.
            jobs: runs the evaluations.
            evaluations: what takes the results.
            session: of a resumed run.
            newest: the weights that were published last.
            env_steps: trained so far in the whole run.
            describe: the run's state beside its weights, for ``keep_best``.
            keep_best: saves weights that are better than all before, with the state when they were taken.
        """
        self._config, self._side, self._jobs, self._evaluations = config, side, jobs, evaluations
        self._session, self._newest, self._env_steps = session, newest, env_steps
        self._describe, self._keep_best = describe, keep_best
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_evaluating, name="evaluator", daemon=True)
        self._due = self._next_due(env_steps())

    def __enter__(self) -> Evaluator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._jobs.kill()
        self._thread.join()

    def _next_due(self, env_steps: int) -> int:
        every = self._config.every_env_steps
        return (env_steps // every + 1) * every

    def _keep_evaluating(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            env_steps = self._env_steps()
            weights = self._newest()
            if weights is None or env_steps < self._due:
                continue
            self._due = self._next_due(env_steps)
            try:
                self._evaluate(weights, env_steps)
            except Exception as error:  # noqa: BLE001  (training goes on whatever fails here)
                if self._stopped.is_set():
                    return
                self._evaluations.failed += 1
                log.warning("evaluation of policy version %d failed: %s", weights.policy_version, error)

    def _evaluate(self, weights: Weights, env_steps: int) -> None:
        state = self._describe() if self._keep_best else {}
        side = dataclasses.replace(self._side, weights=weights)
        self._jobs.submit(functools.partial(_play, side, self._config.episodes, self._config.niceness))
        deadline = time.monotonic() + self._config.max_seconds
        while not self._jobs.poll(_LOOK_SECONDS):
            if self._stopped.is_set():
                return
            if time.monotonic() > deadline:
                self._jobs.end()
                raise JobFailed(f"it took longer than evaluation.max_seconds={self._config.max_seconds:g}")
        played: Episodes = self._jobs.result()
        mean, half_width = confidence_interval(played.by_environment(played.returns))
        result = EvaluationResult(
            time=time.time(),
            session=self._session,
            policy_version=weights.policy_version,
            env_steps=env_steps,
            episodes=played.episodes,
            mean_return=mean,
            return_ci95=None if math.isnan(half_width) else half_width,
            mean_length=played.mean_length,
        )
        # Kept before it is recorded: a kill in between loses a line, which the next session takes from what is kept.
        kept = not self._evaluations.is_best(result) or self._keep(weights, {**state, "evaluation": result._asdict()})
        self._evaluations.add(result, kept=kept)
        log.info("evaluation: %s", sentence(result))

    def _keep(self, weights: Weights, state: Mapping[str, Any]) -> bool:
        """Keep the best weights so far; False where they cannot be: the best is still the one before."""
        if self._keep_best is None:
            return True
        try:
            self._keep_best(weights, state)
        except (OSError, CheckpointError) as error:
            log.warning("the best weights so far could not be kept: %s", error)
            return False
        return True


def kept_state(best: Checkpoints) -> Mapping[str, Any] | None:
    """The state beside the best weights of earlier sessions; None where there are none that can be used.

    What a killed process left behind there is removed.
    """
    try:
        best.clear_abandoned()
        checkpoint = best.latest()
    except (OSError, CheckpointError) as error:
        log.warning("the best weights of earlier sessions cannot be used: %s", error)
        return None
    return checkpoint.state if checkpoint else None
