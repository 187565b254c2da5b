"""The Ray shell of a learner that acts and learns beside the run's own: a process boundary and nothing else."""

from __future__ import annotations

import dataclasses

import ray
import torch

from actors.code import check_same_code
from actors.pool import InlinePool
from actors.ray_actor import Whereabouts, whereabouts
from deploy.layout import Share
from deploy.learner_setup import LearnerSetup
from deploy.ray_session import LOOPBACK
from learner.group import LearnerGroup, join_store, use_interface
from learner.update_loop import NEVER, Turn, UpdateLoop
from policy.allocator import keep_freed_memory


class LearnerActor:
    """One learner with its rollout workers; wrapped by ``ray.remote`` in ``deploy.ray_peers``."""

    def __init__(self, setup: LearnerSetup, share: Share, incarnation: int) -> None:
        self._setup, self._share, self._incarnation = setup, share, incarnation
        self._loop: UpdateLoop
        self._pool: InlinePool
        self._group: LearnerGroup | None = None

    def whereabouts(self) -> Whereabouts:
        """This process."""
        return whereabouts()

    def build(self) -> None:
        """Make learner, policy and environments."""
        check_same_code(self._setup.worker.code)
        keep_freed_memory()
        torch.set_num_threads(1)
        self._loop = self._setup.make_loop(self._share)
        self._pool = self._setup.make_pool(self._share, self._loop, self._incarnation)

    def join(self, address: str, port: int, generation: int, rank: int, size: int, timeout_seconds: float) -> int:
        """Become a member of a new group and take over the run's weights; the policy version."""
        self._leave()
        # On one machine its loopback; else what this machine is reached at.
        use_interface(address if address == LOOPBACK else ray.util.get_node_ip_address())
        self._group = LearnerGroup(
            join_store(address, port, timeout_seconds),
            generation=generation,
            rank=rank,
            size=size,
            timeout_seconds=timeout_seconds,
        )
        self._loop.learner.synchronize(self._group)
        self._loop.publish()
        return self._loop.learner.policy_version

    def turn(self) -> Turn:
        """This learner's part in one update; what goes wrong here frees the others from waiting."""
        try:
            turn = self._loop.turn(self._pool.pump, NEVER)
        except BaseException:
            self._leave()
            raise
        assert turn is not None
        if turn.lost:
            self._leave()
        replaced, self._pool.replaced = tuple(self._pool.replaced), []
        return dataclasses.replace(turn, replaced=replaced)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
