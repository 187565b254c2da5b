"""Takes the first steps in a run's environment with random actions, as ``shoal doctor`` does before a run."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shoal.deploy.evaluation.evaluator import in_one_process
from shoal.deploy.evaluation.job_process import START_SECONDS, JobFailed, JobProcess
from shoal.deploy.evaluation.teams import AllAgents
from shoal.deploy.placement.setups import patterns_of
from shoal.deploy.settings.sections import Config
from shoal.envs.boundary import EnvironmentFault, ReportingEnvironment, StepRows
from shoal.envs.config import EnvConfig
from shoal.envs.pettingzoo import GroupSpec
from shoal.envs.reference import random_player
from shoal.envs.registry import make_env_spec, make_vector_env
from shoal.envs.reports import Reports
from shoal.envs.teams import TeamsEnvironment, make_team_specs

STEPS = 200
"""Of every agent."""
SECONDS = 5.0
"""Longest time that they take, but for the last one."""
SILENT_SECONDS = 60.0
"""Longest time that making the environment, a reset or a step takes."""


class Found(NamedTuple):
    """What the first steps showed."""

    steps: int = 0
    """Of every agent."""
    episodes: int = 0
    """That ended, of all agents."""
    problems: tuple[str, ...] = ()
    """What is wrong with the environment; it would fail in a run, too."""
    remarks: tuple[str, ...] = ()
    """What a run would warn of."""
    answers: bool = True
    """False if it does not come back from its own code."""


def first_steps(config: Config) -> Found:
    """Play one game, or one copy of the environment, in a process of its own, which ends with it."""
    with tempfile.TemporaryDirectory() as directory:
        progress = Path(directory) / "doing"
        process: JobProcess[Found] = JobProcess(silent=True)
        try:
            process.submit(_FirstSteps(env=config.env, agents=patterns_of(config), progress=progress))
            doing, since, limit = b"", time.monotonic(), SILENT_SECONDS + START_SECONDS
            while not process.poll(0.05):
                now = progress.read_bytes() if progress.exists() else b""
                if now != doing:
                    doing, since, limit = now, time.monotonic(), SILENT_SECONDS
                elif time.monotonic() - since > limit:
                    what = doing.decode().partition(" ")[2] or "importing it"
                    return _hangs(f"{config.env.id}: {what} has not ended after {SILENT_SECONDS:.0f} s")
            return process.result()
        except JobFailed as error:
            return Found(problems=(f"{config.env.id}: {error}",))
        finally:
            process.kill()


def _hangs(problem: str) -> Found:
    return Found(problems=(problem,), answers=False)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _FirstSteps:
    """The job."""

    env: EnvConfig
    agents: Mapping[str, Sequence[str]]
    progress: Path
    """A file that says what is being done."""

    def __call__(self) -> Found:
        self._note("making it, with its first reset,")
        try:
            env, act = self._make()
        except (Exception, SystemExit):  # noqa: BLE001  (among the problems that are found by making it)
            return Found()
        try:
            return self._play(env, act)
        except EnvironmentFault as error:
            return Found(problems=(str(error),))
        finally:
            self._note("close")
            env.close()

    def _make(self) -> tuple[Any, Any]:
        """One game of all agents, or one copy, and who acts at random in it."""
        options, kwargs = in_one_process(self.env.options), self.env.kwargs
        seed, rng = np.random.SeedSequence([0, 1]), np.random.default_rng([0, 2])
        if self.agents:
            num_agents = sum(len(group.agents) for group in self._specs())
            teams = TeamsEnvironment(self.env.id, num_agents, seed, options, False, kwargs, self.agents)
            groups = teams.games.groups
            streams = rng.spawn(len(groups))
            env = AllAgents(teams, [random_player(each.spec, one) for each, one in zip(groups, streams, strict=True)])
            return env, env.act
        spec = make_env_spec(self.env.id, options, **kwargs)
        return make_vector_env(self.env.id, spec.num_agents, seed, options, **kwargs), random_player(spec, rng)

    def _specs(self) -> Iterable[GroupSpec]:
        return make_team_specs(self.env.id, self.env.options, self.env.kwargs, self.agents).values()

    def _play(self, env: Any, act: Any) -> Found:
        slots = env.num_envs
        obs = np.empty((slots, *env.spec.obs_shape), env.spec.obs_dtype)
        final_obs = np.empty_like(obs) if env.spec.same_step else None
        flags = np.zeros((3, slots), bool)
        rows = StepRows(obs, flags[0], np.zeros(slots, np.float32), flags[1], flags[2], final_obs)
        rows.is_first[:] = True
        masks = (env.action_mask,) if env.spec.num_mask else ()
        reports = env.reports if isinstance(env, ReportingEnvironment) else Reports()
        self._note("reset")
        env.reset(obs)
        steps = episodes = 0
        until = time.monotonic() + SECONDS
        while steps < STEPS and time.monotonic() < until:
            self._note(f"step {steps + 1}")
            env.step(act(rows.obs, rows.is_first, *masks), rows)
            steps += 1
            episodes += int((rows.terminated | rows.truncated).sum())
        faults = list(dict.fromkeys(env.faults))
        count = f" ({len(faults)} faults in {steps} steps)" if len(faults) > 1 else ""
        problems = [f"{fault}{count}" for fault in faults[:1]]
        return Found(steps, episodes, tuple(problems), tuple(reports.examples.values()))

    def _note(self, doing: str) -> None:
        """Say what is done from now on; each note is another one."""
        self.progress.write_text(f"{time.monotonic_ns()} {doing}")
