"""The Ray shell of a peer learner: a process boundary and nothing else."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
import torch
from shoal.actors.code import check_same_code
from shoal.actors.pool import InlinePool
from shoal.actors.ray_actor import ProcessLocation, process_location
from shoal.actors.ray_pool import RayPool
from shoal.deploy.cluster.ray_session import LOOPBACK
from shoal.deploy.placement.layout import Share
from shoal.deploy.placement.learner_setup import LearnerSetup, RolloutProcesses
from shoal.learner.group import LearnerGroup, join_store, use_interface
from shoal.learner.learner_worker import NEVER, LearnerWorker, Lost, StepResult
from shoal.learner.learners import PeerResult
from shoal.learner.ledger import Ledger
from shoal.learner.recorder import Recorded
from shoal.learner.rollout_driver import RolloutDriver
from shoal.policy.allocator import keep_freed_memory


class LearnerActor:
    """One learner with its rollout workers; wrapped by ``ray.remote`` in ``deploy.cluster.ray_peers``."""

    def __init__(self, setup: LearnerSetup, share: Share, restart_index: int) -> None:
        self._setup, self._share, self._restart_index = setup, share, restart_index
        self._learner: LearnerWorker
        self._pool: InlinePool | RayPool
        self._driver: RolloutDriver | None = None
        self._group: LearnerGroup | None = None
        self._reported = Ledger()
        """The queue's ledger at the last report."""
        self._reported_lost_unrolls = 0

    def process_location(self) -> ProcessLocation:
        """The location of this process."""
        return process_location()

    def build(self) -> None:
        """Make learner, policy and environments; with rollout actors, wait for the first of them.

        A learner without an actor would make its peers wait.
        """
        setup = self._setup
        check_same_code(setup.worker.code)
        keep_freed_memory()
        torch.set_num_threads(1)
        self._learner = setup.make_learner_worker(self._share)
        if setup.rollout_processes is None:
            self._pool = setup.make_pool(self._share, self._learner.queue, self._restart_index)
        else:
            self._feed_from(setup.rollout_processes)

    def _feed_from(self, processes: RolloutProcesses) -> None:
        self._learner.publish_to = ray.put
        self._pool = RayPool(
            self._setup.worker,
            self._share.actors,
            processes.config,
            self._learner.queue,
            processes.options,
            first_restart_index=self._restart_index << 16,
        )
        self._driver = RolloutDriver(self._pool.pump, self._learner.queue)
        self._driver.start()
        while not self._pool.num_alive and self._driver.is_alive():
            time.sleep(0.05)

    def join(self, address: str, port: int, generation: int, rank: int, size: int, timeout_seconds: float) -> int:
        """Join a new group, copy the run's weights and return their policy version."""
        self._leave()
        # On one machine its loopback address, otherwise the address that other nodes reach this one at.
        use_interface(address if address == LOOPBACK else ray.util.get_node_ip_address())
        self._group = LearnerGroup(
            join_store(address, port, timeout_seconds),
            device=self._learner.learner.path.device,
            generation=generation,
            rank=rank,
            size=size,
            timeout_seconds=timeout_seconds,
        )
        self._learner.learner.synchronize(self._group)
        self._learner.publish()
        return self._learner.learner.policy_version

    def step(self, env_options: Mapping[str, Any] | None) -> PeerResult:
        """This learner's part in one update; after an error it leaves the group, so that no peer waits for it.

        ``env_options`` go with the weights that it publishes.
        """
        self._learner.env_options = env_options
        try:
            result = self._learner.step(None if self._driver else self._pool.pump, NEVER)
        except BaseException:
            self._leave()
            raise
        assert result is not None
        if isinstance(result.outcome, Lost):
            self._leave()
        return self._report(result)

    def recorded(self, attempts: Collection[int]) -> list[Recorded]:
        """This learner's parts in these updates, for rank 0 to write."""
        recorder = self._learner.recorder
        found = [one.on_cpu() for one in recorder.unwritten() if one.attempt in attempts]
        recorder.was_written([one.attempt for one in recorder.unwritten()])
        return found

    def _report(self, step: StepResult) -> PeerResult:
        """The step's result with all other counts since the last report."""
        queue, pool = self._learner.queue, self._pool
        ledger, lost_unrolls = queue.snapshot(), queue.lost_unrolls
        result = PeerResult(
            step=step,
            ledger=ledger.since(self._reported).since(step.ledger),
            lost_unrolls=lost_unrolls - self._reported_lost_unrolls,
            replaced=tuple(pool.replaced.popleft() for _ in range(len(pool.replaced))),
            num_alive=pool.num_alive,
            lags=tuple(queue.lags()),
            late_unrolls=queue.late(),
        )
        self._reported, self._reported_lost_unrolls = ledger, lost_unrolls
        return result

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
