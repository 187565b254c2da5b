"""The return of a random policy in a run's environment: what the run's own return is compared with.

Whole episodes in environments and with random streams of their own. Episodes of the untrained policy would not do:
those that have ended before the first updates are the short ones. Where several policies are trained, all agents of the
games act at random, and each policy's return is that of its own agents.

A process that plays the run's environments itself plays these, too, before the first update and while other processes
start: nothing draws from one stream in between. Where environments live elsewhere this process makes none of them,
whose faults could end it; another one plays, beside the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from shoal.actors.teams import TeamSetup
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluator import Jobs
from shoal.deploy.evaluation.teams import random_team_returns
from shoal.deploy.monitoring.intervals import confidence_interval
from shoal.deploy.monitoring.learning import Interval
from shoal.envs.config import in_one_process
from shoal.envs.play import Episodes
from shoal.envs.reference import random_return
from shoal.envs.surroundings import Abandoned, abandon

log = logging.getLogger(__name__)

EPISODES = 512
ENV_STEPS = 120_000
SLOTS = 16
"""Fewer slots end their first episodes sooner."""
SHARE_BEFORE = 0.05
"""Longest share of ``max_seconds`` before the first update."""
SECONDS_AFTER = 60.0
"""Longest time after the training, where there was too little before for an episode of every slot."""
_GRACE_SECONDS = 5.0

Returns = Mapping[str, Interval]
"""By the name of the policy, which is "" where there is one; without those that are not known."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomPlay:
    """Episodes of uniformly random actions; plain data that crosses to other processes, as a job."""

    setup: WorkerSetup | TeamSetup
    num_agents: int
    """That share an environment, of all policies."""
    niceness: int
    """Of the process that plays them as a job."""

    def __call__(self) -> Returns:
        """Play for ``SECONDS_AFTER`` at most, in a process that does nothing else."""
        os.setpriority(os.PRIO_PROCESS, 0, max(self.niceness, os.getpriority(os.PRIO_PROCESS, 0)))
        until = time.monotonic() + SECONDS_AFTER
        return self._play(lambda: time.monotonic() > until)

    def here(self, seconds: float, stop: Callable[[], bool]) -> Returns | None:
        """Play for ``seconds`` at most, in this process, whose global random streams stay as they were.

        The same figures in every run of an environment, unless time or ``stop`` ends it early: None where that was
        before an episode of every slot. Empty where the environment fails, or its episodes do not end.
        """
        found: list[Returns] = []
        until = time.monotonic() + seconds
        early = False

        def enough() -> bool:
            nonlocal early
            early = early or stop() or time.monotonic() > until
            return early

        def play() -> None:
            try:
                found.append(self._play(enough))
            except Abandoned:
                pass
            except Exception as error:  # noqa: BLE001  (environments raise anything)
                _unknown(error)
                found.append({})

        # In a thread, because an environment that hangs never returns.
        thread = threading.Thread(target=play, name="random-play", daemon=True)
        with _global_streams_kept():
            thread.start()
            while thread.is_alive() and time.monotonic() < until + _GRACE_SECONDS and not stop():
                thread.join(0.1)
            if thread.is_alive():
                abandon(thread)
        if not found or (early and not found[0]):
            return None
        return found[0]

    def _play(self, enough: Callable[[], bool]) -> Returns:
        found = {}
        for policy, played in self._episodes(enough).items():
            mean, half_width = confidence_interval(played.by_environment(played.returns))
            if not math.isnan(mean):
                found[policy] = Interval(mean, half_width)
        return found

    def _episodes(self, enough: Callable[[], bool]) -> Mapping[str, Episodes]:
        first = self.setup.first if isinstance(self.setup, TeamSetup) else self.setup
        most: dict[str, Any] = {"episodes": EPISODES, "max_env_steps": ENV_STEPS, "enough": enough}
        options, games = in_one_process(first.env_options, max(SLOTS // self.num_agents, 2))
        slots = games * self.num_agents
        if isinstance(self.setup, TeamSetup):
            return random_team_returns(
                first.env_id, self.setup.agents, num_envs=slots, env_kwargs=first.env_kwargs, options=options, **most
            )
        return {"": random_return(first.env_id, num_envs=slots, env_kwargs=first.env_kwargs, options=options, **most)}


class RandomPlayer:
    """Finds the return of a random policy for a run, or for each of its policies, and passes it to ``found``.

    Args:
        play: the episodes.
        seconds: longest time before the first update; 0 plays none at all.
        found: takes the result, from any thread.
        jobs: a process that plays beside the training; None plays in this one, before it.
    """

    def __init__(self, play: RandomPlay, seconds: float, found: Callable[[Returns], None], jobs: Jobs | None) -> None:
        self._play, self._seconds, self._jobs = play, seconds, jobs
        self._found = found
        self._through = False
        self._stopped: Callable[[], bool] = lambda: False
        self._beside = threading.Thread(target=self._play_beside, name="random-play", daemon=True)

    def before(self, stop: Callable[[], bool]) -> None:
        """Play, or begin to; ``stop`` ends it."""
        if not self._seconds:
            return
        self._stopped = stop
        if self._jobs:
            self._beside.start()
        else:
            self._take(self._play.here(self._seconds, stop))

    def after(self, stop: Callable[[], bool], seconds: float = math.inf) -> None:
        """Go on when training is over, if there was no time for episodes before: for ``seconds`` and for
        ``SECONDS_AFTER`` at most; ``stop`` ends it."""
        seconds = min(seconds, SECONDS_AFTER)
        if self._through or not self._seconds or seconds <= 0 or stop():
            return
        if self._jobs and not self._beside.is_alive():
            return  # it failed, which was said
        log.warning(
            "no episodes of random actions to compare with have ended yet: they are played for %.0f s at most "
            "(evaluation.random_seconds=0 leaves them out)",
            seconds,
        )
        if self._jobs:
            until = time.monotonic() + seconds
            while self._beside.is_alive() and time.monotonic() < until and not stop():
                self._beside.join(0.1)
        else:
            self._take(self._play.here(seconds, stop))

    def close(self) -> None:
        """End the process that plays."""
        if self._jobs:
            self._jobs.kill()

    def _play_beside(self) -> None:
        assert self._jobs is not None
        try:
            self._jobs.submit(self._play)
            self._take(self._jobs.result())
        except Exception as error:  # noqa: BLE001  (training goes on whatever fails here)
            if not self._stopped():
                _unknown(error)
        finally:
            self._jobs.end()

    def _take(self, result: Returns | None) -> None:
        self._through = result is not None
        if result:
            self._found(result)


def _unknown(error: Exception) -> None:
    log.warning("the return of random actions could not be measured: %s", error)


@contextlib.contextmanager
def _global_streams_kept() -> Iterator[None]:
    """Leave the process' random streams as they were: an environment may draw from them, where it should not."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_)
