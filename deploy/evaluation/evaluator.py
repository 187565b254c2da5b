"""Evaluation during training: whole episodes with the newest weights, in a process of its own.

A thread looks now and then whether one is due, and hands the weights that were published last to the process: of
several policies, which play together, those of one round of updates. The training loop waits for nothing.
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
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from shoal.actors.teams import TeamSetup
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluate import Side, play_sides
from shoal.deploy.evaluation.job_process import JobFailed
from shoal.deploy.evaluation.teams import TeamsSide, play_teams, unplayed_side
from shoal.deploy.monitoring.intervals import confidence_interval
from shoal.deploy.records.evaluations import EvaluationResult, Evaluations, sentence
from shoal.deploy.settings.sections import EvaluationConfig
from shoal.envs.config import in_one_process
from shoal.envs.play import Episodes
from shoal.learner.checkpoint import CheckpointError, Checkpoints
from shoal.learner.learner_worker import LearnerWorker, StepResult
from shoal.learner.training_loop import Observer
from shoal.policy.weights import Weights

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
LAST_SECONDS = 30.0
"""Longest time that a run waits for its last evaluation."""
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


class Taken(NamedTuple):
    """The weights of a policy, to be evaluated."""

    weights: Weights
    env_steps: int
    """Environment steps that it was trained with, in the whole run."""


class Rounds:
    """The newest weights of every policy, all after the same round of updates; an ``Observer`` of the training loop.

    The policies are updated in turn: whoever looks at their learners in between finds some that are ahead.
    """

    def __init__(self, learners: Mapping[str, LearnerWorker], observer: Observer) -> None:
        """Observe ``learners`` by the name of the policy; ``observer`` is told all that this is."""
        self._learners, self._observer = learners, observer
        self._newest: Mapping[str, Taken] = {}

    @property
    def newest(self) -> Mapping[str, Taken]:
        """By the name of the policy; empty before the first round. From any thread."""
        return self._newest

    def updated(self, policy: str, result: StepResult) -> None:
        """As in ``Observer``: by then all policies have had their update."""
        self._newest = {
            name: Taken(learner.weights, learner.queue.ledger.trained)
            for name, learner in self._learners.items()
            if learner.weights is not None
        }
        self._observer.updated(policy, result)

    def saved(self, path: Path) -> None:
        """As in ``Observer``."""
        self._observer.saved(path)


def training_side(
    setup: WorkerSetup | TeamSetup,
    config: EvaluationConfig,
    *,
    num_agents: int,
    seed: int,
    agents: Mapping[str, tuple[int, ...]] | None = None,
) -> Side | TeamsSide:
    """A run's own policies without their weights, to be evaluated every time with the same seeds, so that evaluations
    differ by their weights alone. ``num_agents`` share an environment; ``agents`` are those of each of several policies
    among them.
    """
    stream = np.random.SeedSequence(seed, spawn_key=(_STREAM,)).generate_state(1, np.uint64)[0]
    most = min(setup.num_envs // num_agents, -(-config.episodes // num_agents))

    def own(setup: WorkerSetup, num_agents: int) -> WorkerSetup:
        options, games = in_one_process(setup.env_options, most)
        return dataclasses.replace(setup, env_options=options, num_envs=games * num_agents, seed=int(stream >> 1))

    if isinstance(setup, TeamSetup):
        assert agents is not None
        setups = {name: own(each, len(agents[name])) for name, each in setup.setups.items()}
        return unplayed_side(dataclasses.replace(setup, setups=setups), agents, greedy=config.greedy)
    return Side(label="evaluation", setup=own(setup, num_agents), weights=None, greedy=config.greedy)


def _play(side: Side | TeamsSide, episodes: int, niceness: int) -> Mapping[str, Episodes]:
    """The episodes of every policy; of the only one by the name ""."""
    # Not before: at a low priority a process may take minutes to import what it needs.
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    if isinstance(side, TeamsSide):
        return play_teams(side, episodes, processes=1).policies
    return {"": play_sides([side], episodes, processes=1)[0]}


class Evaluator:
    """The thread; leaving its block waits for the last evaluation, unless the run was interrupted or has failed."""

    def __init__(
        self,
        config: EvaluationConfig,
        side: Side | TeamsSide,
        jobs: Jobs,
        evaluations: Mapping[str, Evaluations],
        *,
        session: int,
        newest: Callable[[], Mapping[str, Taken]],
        env_steps: int,
        describe: Callable[[], Mapping[str, Any]],
        keep_best: Callable[[Weights, Mapping[str, Any]], object] | None,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare.

        Args:
            config: when and how.
            side: policies and way of playing, without the weights.
            jobs: runs the evaluations.
            evaluations: what takes the results of each policy.
            session: of a resumed run.
            newest: the weights of every policy that were published last; empty where there are none.
            env_steps: trained by all policies in earlier sessions.
            describe: the run's state beside its weights, for ``keep_best``.
            keep_best: saves weights that are better than all before, with the state when they were taken; for the only
                policy of a run.
            hurried: whether the run is to end at once.
        """
        self._config, self._side, self._jobs, self._evaluations = config, side, jobs, evaluations
        self._session, self._newest = session, newest
        self._describe, self._keep_best, self._hurried = describe, keep_best, hurried
        self._under_way = ""
        """The policy versions that are being evaluated."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_evaluating, name="evaluator", daemon=True)
        self._due = self._next_due(env_steps)

    def __enter__(self) -> Evaluator:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._await_last()
        if versions := self._under_way:
            log.warning("the evaluation of policy version %s had not ended when the run did, and is left out", versions)
        self._stopped.set()
        self._jobs.kill()
        self._thread.join()

    def _next_due(self, env_steps: int) -> int:
        every = self._config.every_env_steps
        return (env_steps // every + 1) * every

    def _await_last(self) -> None:
        """Wait for what is under way or due, for ``LAST_SECONDS`` at most."""
        begun, said = time.monotonic(), False
        while (self._under_way or self._is_due()) and not self._hurried():
            seconds = time.monotonic() - begun
            if seconds > LAST_SECONDS:
                return
            if seconds > _LOOK_SECONDS and not said and self._under_way:
                said = True
                log.warning(
                    "training is over; the evaluation of policy version %s is waited for, for %.0f s at most (Ctrl-C "
                    "leaves it out)",
                    self._under_way,
                    LAST_SECONDS,
                )
            time.sleep(0.05)

    def _is_due(self) -> bool:
        return sum(each.env_steps for each in self._newest().values()) >= self._due

    def _keep_evaluating(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            taken = self._newest()
            env_steps = sum(each.env_steps for each in taken.values())
            if not taken or env_steps < self._due:
                continue
            self._under_way = _versions(taken)
            self._due = self._next_due(env_steps)
            try:
                self._evaluate(taken)
            except Exception as error:  # noqa: BLE001  (training goes on whatever fails here)
                if self._stopped.is_set():
                    return
                for each in self._evaluations.values():
                    each.failed += 1
                log.warning("evaluation of policy version %s failed: %s", _versions(taken), error)
            finally:
                self._under_way = ""

    def _evaluate(self, taken: Mapping[str, Taken]) -> None:
        state = self._describe() if self._keep_best else {}
        side = self._side.with_weights({name: each.weights for name, each in taken.items()})
        self._jobs.submit(functools.partial(_play, side, self._config.episodes, self._config.niceness))
        deadline = time.monotonic() + self._config.max_seconds
        while not self._jobs.poll(_LOOK_SECONDS):
            if self._stopped.is_set():
                return
            if time.monotonic() > deadline:
                self._jobs.end()
                raise JobFailed(f"it took longer than evaluation.max_seconds={self._config.max_seconds:g}")
        played: Mapping[str, Episodes] = self._jobs.result()
        now = time.time()
        for policy, own in played.items():
            weights, env_steps = taken[policy]
            if not own.episodes:
                log.warning("%s: no agent of this policy was in a game of the evaluation", policy)
                continue
            mean, half_width = confidence_interval(own.by_environment(own.returns))
            result = EvaluationResult(
                time=now,
                session=self._session,
                policy_version=weights.policy_version,
                env_steps=env_steps,
                episodes=own.episodes,
                mean_return=mean,
                return_ci95=None if math.isnan(half_width) else half_width,
                mean_length=own.mean_length,
                policy=policy,
            )
            evaluations = self._evaluations[policy]
            # Kept before it is recorded: a kill in between loses a line, which the next session takes from what is
            # kept.
            kept = not evaluations.is_best(result) or self._keep(weights, {**state, "evaluation": result.to_json()})
            evaluations.add(result, kept=kept)
            log.info("%sevaluation: %s", policy and f"{policy}: ", sentence(result))

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


def _versions(taken: Mapping[str, Taken]) -> str:
    """``3``, or of several policies ``3 of hunters, 4 of runners``."""
    return ", ".join(f"{each.weights.policy_version}{policy and f' of {policy}'}" for policy, each in taken.items())


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
