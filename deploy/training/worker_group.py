"""Starts and ends the workers of a run: rollout workers in this process or on Ray, and peer learners."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from shoal.actors.pool import ActorState, InlinePool, Recoveries
from shoal.actors.ray_watch import RayLost, RayWatch
from shoal.actors.teams import TeamSetup
from shoal.actors.worker_setup import WorkerSetup
from shoal.deploy.evaluation.evaluator import Jobs
from shoal.deploy.placement.learner_setup import RolloutProcesses
from shoal.deploy.placement.setups import patterns_of
from shoal.deploy.training.prepared_run import PreparedRun
from shoal.learner.learners import Learners, OneLearner, SeveralLearners
from shoal.learner.ledger import Ledger
from shoal.learner.policy_queues import PolicyQueues
from shoal.learner.rollout_driver import RolloutDriver
from shoal.learner.trajectory_queue import TrajectoryQueue

if TYPE_CHECKING:  # Ray is imported where it is used
    from shoal.deploy.cluster.ray_peers import RayPeers
    from shoal.deploy.cluster.ray_session import RaySession


Made = TypeVar("Made")


class Pool(Protocol):
    """Rollout workers: ``actors.pool.InlinePool`` or ``actors.ray_pool.RayPool``."""

    @property
    def restarts(self) -> Counter[str]:
        """Number of replaced workers by reason."""

    @property
    def num_alive(self) -> int:
        """Workers that can make unrolls."""

    @property
    def states(self) -> Counter[ActorState]:
        """Number of workers by state."""

    @property
    def recoveries(self) -> Recoveries:
        """Number and duration of the replacements."""

    def pump(self, timeout: float) -> None:
        """Make or collect unrolls."""

    def close(self) -> None:
        """End all workers."""


@dataclasses.dataclass(slots=True)
class WorkerGroup:
    """The rollout workers that feed the run's own learner, and the peer learners with theirs."""

    pool: Pool
    learners: tuple[Learners, ...]
    """The learners of every policy, behind the one call that the training loop makes."""
    driver: RolloutDriver | None = None
    """Pumps the pool where the learner does not drive it itself."""
    peers: RayPeers | None = None
    elsewhere: Jobs | None = None
    """Does jobs where the environments are, if those are not in this process."""
    watch: RayWatch | None = None
    """Notices that Ray is lost; None where there is none."""

    @property
    def num_alive(self) -> int:
        """Rollout workers that can make unrolls."""
        return self.pool.num_alive + (self.peers.num_actors_alive if self.peers else 0)

    @property
    def states(self) -> dict[str, int]:
        """Number of rollout workers in every state, 0 included."""
        found = Counter[str](self.pool.states) + (self.peers.actor_states if self.peers else Counter())
        return {state: found[state] for state in get_args(ActorState)}

    @property
    def restarts(self) -> Counter[str]:
        """Number of replaced actors, and of replaced learners that also act, by reason."""
        return self.pool.restarts + (self.peers.restarts if self.peers else Counter())

    @property
    def recoveries(self) -> Recoveries:
        """Number and duration of the replacements of own actors and of peer learners."""
        own = self.pool.recoveries
        if not self.peers:
            return own
        peers = self.peers.recoveries
        return Recoveries(own.count + peers.count, own.seconds + peers.seconds, max(own.slowest, peers.slowest))

    def lags(self) -> list[int]:
        """Policy lag of every unroll under way: the versions made since it began."""
        return [*self.learners[0].worker.queue.lags(), *(self.peers.lags if self.peers else ())]

    def late_unrolls(self) -> int:
        """Unrolls under way that will be too old to be trained when they come back."""
        return self.learners[0].worker.queue.late() + (self.peers.late_unrolls if self.peers else 0)

    def close(self) -> None:
        """End the driver, then the peers, then the pool: nothing pumps a pool that is closed.

        What is Ray's is not waited for where Ray is lost.
        """
        if self.driver and self.watch:
            self.driver.stop(self.watch.call)
        if self.peers:
            self.peers.close()
        if self.driver and self.watch:
            self.watch.call(self.pool.close)
        else:
            self.pool.close()


@contextlib.contextmanager
def start_workers(
    runs: Sequence[PreparedRun], *, owns_process: bool = True, gone: Callable[[str], object] = lambda why: None
) -> Iterator[WorkerGroup]:
    """The worker group of a run, and Ray where it needs it, for the length of the block.

    ``runs``: one, or one for each of several policies, whose workers play in the same games. ``owns_process``: this
    process ends with the run. ``gone`` is called with the reason, from another thread, where Ray ends while it is
    started and its own start does not end.

    Raises:
        RayLost: Ray ended before the workers were started.
    """
    run = runs[0]
    fed = run.layout.placement == "disaggregated"
    if run.config.mode == "inline" or (run.layout.num_learners == 1 and not fed):
        pool = _inline_pool(runs)
        yield WorkerGroup(pool, tuple(OneLearner(worker=each.learner, drive=pool.pump) for each in runs))
        return
    with _ray(runs, owns_process=owns_process, gone=gone) as ray:
        peers = _made(ray, _peers, run, ray) if run.layout.num_learners > 1 else None
        if not fed:
            pool = _inline_pool(runs)
            assert peers is not None
            several = SeveralLearners(worker=run.learner, drive=pool.pump, peers=peers)
            yield WorkerGroup(pool, (several,), peers=peers, watch=ray.watch)
            return
        from shoal.actors.ray_pool import RayPool
        from shoal.deploy.evaluation.ray_jobs import RayJobs

        for each in runs:
            each.learner.publish_to = ray.put
        sink = _sink(runs)
        make_pool = functools.partial(RayPool, out_of_reach=ray.watch.out_of_reach)
        actors = _made(
            ray, make_pool, setup_of_actors(runs), run.share.actors, run.config.actor, sink, ray.actor_options
        )
        learners: tuple[Learners, ...] = tuple(OneLearner(worker=each.learner, drive=None) for each in runs)
        if peers:
            learners = (SeveralLearners(worker=run.learner, drive=None, peers=peers),)
        yield WorkerGroup(
            actors,
            learners,
            driver=RolloutDriver(ray.watch.pump(actors.pump), sink),
            peers=peers,
            elsewhere=RayJobs(ray.actor_options, ray.watch),
            watch=ray.watch,
        )


def setup_of_actors(runs: Sequence[PreparedRun]) -> WorkerSetup | TeamSetup:
    """What every actor is made from, with the workers of all policies."""
    if len(runs) == 1:
        return runs[0].setup.worker
    return TeamSetup(agents=patterns_of(runs[0].config), setups={run.policy: run.setup.worker for run in runs})


def _sink(runs: Sequence[PreparedRun]) -> TrajectoryQueue | PolicyQueues:
    if len(runs) == 1:
        return runs[0].learner.queue
    return PolicyQueues({run.policy: run.learner.queue for run in runs})


def _inline_pool(runs: Sequence[PreparedRun]) -> InlinePool:
    run = runs[0]
    return InlinePool(
        setup_of_actors(runs),
        run.share.actors,
        _sink(runs),
        max_consecutive_failures=run.setup.max_consecutive_failures,
    )


def _made(ray: RaySession, make: Callable[..., Made], *arguments: Any) -> Made:
    """What ``make`` makes with Ray, which may be lost meanwhile.

    Raises:
        RayLost: it is.
    """
    made = ray.watch.call(make, *arguments)
    if made is None:
        raise RayLost(f"{ray.watch.why}; nothing was trained")
    return made


def _ray(
    runs: Sequence[PreparedRun], *, owns_process: bool, gone: Callable[[str], object]
) -> contextlib.AbstractContextManager[RaySession]:
    from shoal.deploy.cluster import ray_session

    run = runs[0]
    if run.cluster:
        return contextlib.nullcontext(run.cluster.session(run.machine))
    unroll = sum(
        array.nbytes / each.share.batch_size * each.setup.worker.num_envs
        for each in runs
        for array in each.learner.assembler.arrays.values()
    )
    return ray_session.local(
        num_actors=run.layout.num_actors if run.layout.placement == "disaggregated" else 0,
        num_learners=run.layout.num_learners - 1,
        unroll_bytes=int(unroll),
        accelerator=run.machine.accelerator,
        owns_process=owns_process,
        gone=gone,
    )


def _peers(run: PreparedRun, ray: RaySession) -> RayPeers:
    from shoal.deploy.cluster.ray_peers import RayPeers

    setup, queue = run.setup, run.learner.queue
    if run.layout.placement == "disaggregated":
        feeding = RolloutProcesses(config=run.config.actor, options=ray.actor_options)
        setup = dataclasses.replace(setup, rollout_processes=feeding)
    unrolls = run.share.batch_size // run.config.env.num_envs
    return RayPeers(
        setup,
        run.layout,
        run.config.actor,
        ray,
        on_lost_update=lambda: queue.add_lost_unrolls(unrolls),
        on_lost_steps=lambda steps, reason: queue.add(Ledger(in_flight=-steps, dropped=Counter({reason: steps}))),
    )
