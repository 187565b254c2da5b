"""The Ray shell of a learner beside the run's own: a process boundary and nothing else."""

from __future__ import annotations

import dataclasses
import time
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
from shoal.learner.ledger import Ledger
from shoal.learner.trajectory_queue import Driver
from shoal.learner.update_step import NEVER, StepResult, UpdateLoop
from shoal.policy.allocator import keep_freed_memory


class LearnerActor:
    """One learner with its rollout workers; wrapped by ``ray.remote`` in ``deploy.cluster.ray_peers``."""

    def __init__(self, setup: LearnerSetup, share: Share, restart_index: int) -> None:
        self._setup, self._share, self._restart_index = setup, share, restart_index
        self._loop: UpdateLoop
        self._pool: InlinePool | RayPool
        self._driver: Driver | None = None
        self._group: LearnerGroup | None = None
        self._told = Ledger()
        """What of the trajectory queue's books the run's own learner knows."""
        self._told_lost = 0

    def process_location(self) -> ProcessLocation:
        """This process."""
        return process_location()

    def build(self) -> None:
        """Make learner, policy and environments; with rollout actors, wait for the first of them.

        A learner that nobody feeds would make the others wait.
        """
        setup = self._setup
        check_same_code(setup.worker.code)
        keep_freed_memory()
        torch.set_num_threads(1)
        self._loop = setup.make_loop(self._share)
        if setup.rollout_processes is None:
            self._pool = setup.make_pool(self._share, self._loop, self._restart_index)
        else:
            self._feed_from(setup.rollout_processes)

    def _feed_from(self, processes: RolloutProcesses) -> None:
        self._loop.publish_to = ray.put
        self._pool = RayPool(
            self._setup.worker,
            self._share.actors,
            processes.config,
            self._loop.trajectory_queue,
            processes.options,
            first_restart_index=self._restart_index << 16,
        )
        self._driver = Driver(self._pool.pump, self._loop.trajectory_queue)
        self._driver.start()
        while not self._pool.num_alive and self._driver.is_alive():
            time.sleep(0.05)

    def join(self, address: str, port: int, generation: int, rank: int, size: int, timeout_seconds: float) -> int:
        """Become a member of a new group and take over the run's weights; the policy version."""
        self._leave()
        # On one machine its loopback; else what this machine is reached at.
        use_interface(address if address == LOOPBACK else ray.util.get_node_ip_address())
        self._group = LearnerGroup(
            join_store(address, port, timeout_seconds),
            device=self._loop.learner.path.device,
            generation=generation,
            rank=rank,
            size=size,
            timeout_seconds=timeout_seconds,
        )
        self._loop.learner.synchronize(self._group)
        self._loop.publish()
        return self._loop.learner.policy_version

    def turn(self) -> StepResult:
        """This learner's part in one update; what goes wrong here frees the others from waiting."""
        try:
            turn = self._loop.turn(None if self._driver else self._pool.pump, NEVER)
        except BaseException:
            self._leave()
            raise
        assert turn is not None
        if turn.lost:
            self._leave()
        return dataclasses.replace(turn, **self._news(turn))

    def _news(self, turn: StepResult) -> dict[str, Any]:
        """What happened since the last turn, besides what ``turn`` says."""
        trajectory_queue, pool = self._loop.trajectory_queue, self._pool
        books = trajectory_queue.books()
        beside = books.since(self._told).since(turn.books)
        lost = trajectory_queue.lost_unrolls
        news = {
            "beside": beside,
            "lost_unrolls": lost - self._told_lost,
            "num_alive": pool.num_alive,
            "lags": tuple(trajectory_queue.lags()),
        }
        self._told, self._told_lost = books, lost
        replaced = tuple(pool.replaced.popleft() for _ in range(len(pool.replaced)))
        return {**news, "replaced": replaced}

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
