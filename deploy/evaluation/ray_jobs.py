"""Jobs in a Ray actor, somewhere in the cluster: what ``deploy.evaluation.job_process`` is on one machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from shoal.actors.ray_watch import RayWatch
from shoal.deploy.evaluation.job_process import JobFailed


class EvaluationActor:
    """The process that runs the jobs."""

    def do(self, job: Callable[[], Any]) -> Any:
        """Run a job and return its value."""
        return job()


class RayJobs:
    """One actor that takes no place from others, replaced when it ends. Nobody waits for a Ray that is lost."""

    def __init__(self, options: Mapping[str, Any], watch: RayWatch) -> None:
        """Prepare; ``options`` are Ray's of a rollout actor, whose labels say where environments are installed."""
        self._watch = watch
        labels = {name: value for name, value in options.items() if name in ("label_selector", "scheduling_strategy")}
        self._options: dict[str, Any] = {**labels, "num_cpus": 0, "max_restarts": 0}
        self._actor: Any = None
        self._ref: Any = None
        self._killed = False

    def submit(self, job: Callable[[], Any]) -> None:
        """Hand over a job; ``result`` must follow."""
        if self._killed:
            raise JobFailed("it was ended")
        if self._watch.out_of_reach():
            raise JobFailed(self._watch.why)
        if self._actor is None:
            self._actor = ray.remote(EvaluationActor).options(**self._options).remote()
        self._ref = self._actor.do.remote(job)

    def poll(self, seconds: float) -> bool:
        """Wait at most ``seconds``; True if ``result`` will not block."""
        ready = self._watch.call(lambda: ray.wait([self._ref], timeout=seconds)[0])
        return bool(ready) or self._watch.lost.is_set()

    def result(self) -> Any:
        """The return value of the job.

        Raises:
            JobFailed: it raised, its process or node died, or Ray is lost.
        """
        try:
            answer = self._watch.call(ray.get, self._ref)
            if self._watch.lost.is_set():
                raise JobFailed(self._watch.why)
            return answer
        except RayTaskError as error:
            cause = error.cause
            raise JobFailed(f"{type(cause).__name__}: {cause}") from error
        except RayError as error:
            self.end()
            raise JobFailed(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    def end(self) -> None:
        """End the actor; the next job gets a new one."""
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(RayError):
                self._watch.call(ray.kill, actor)

    def kill(self) -> None:
        """End the actor for good."""
        self._killed = True
        self.end()
