"""Takes the first steps in a run's environment in a process of their own, as ``shoal doctor`` does before a run."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shoal.deploy.doctor.not_made import why_not_made
from shoal.deploy.evaluation.job_process import START_SECONDS, JobFailed, JobProcess
from shoal.deploy.placement.setups import patterns_of
from shoal.deploy.settings.sections import Config
from shoal.envs.config import EnvConfig
from shoal.envs.first_steps import FirstSteps, take_first_steps

STEPS = 200
"""Of every agent."""
SECONDS = 5.0
"""Longest time that they take, but for the last one."""
SILENT_SECONDS = 60.0
"""Longest time that making the environment, a reset or a step takes."""


class Found(NamedTuple):
    """What the first steps showed, and what is wrong with the environment."""

    tried: FirstSteps = FirstSteps()
    problems: tuple[str, ...] = ()
    """It would fail in a run, too. Each begins with the setting that it comes from."""


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
                    return _fails(config, f"{what} has not ended after {SILENT_SECONDS:.0f} s")
            return process.result()
        except JobFailed as error:
            return _fails(config, str(error))
        finally:
            process.kill()


def _fails(config: Config, why: str) -> Found:
    return Found(problems=(f"env.id: {config.env.id}: {why}",))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _FirstSteps:
    """The job."""

    env: EnvConfig
    agents: Mapping[str, Sequence[str]]
    progress: Path
    """A file that says what is being done."""

    def __call__(self) -> Found:
        env = self.env
        try:
            tried = take_first_steps(
                env.id, env.options, env.kwargs, self.agents, steps=STEPS, seconds=SECONDS, note=self._note
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001  (the environment is the user's)
            return Found(problems=tuple(why_not_made(env.id, error)))
        if tried.fault:
            return Found(tried, (f"env.id: {tried.fault}",))
        count = f" ({len(tried.faults)} faults in {tried.steps} steps)" if len(tried.faults) > 1 else ""
        return Found(tried, tuple(f"env.id: {fault}{count}" for fault in tried.faults[:1]))

    def _note(self, doing: str) -> None:
        """Say what is done from now on; each note is another one."""
        self.progress.write_text(f"{time.monotonic_ns()} {doing}")
