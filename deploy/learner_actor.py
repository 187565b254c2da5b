"""The Ray shell of a learner that acts and learns beside the run's own: a process boundary and nothing else."""

from __future__ import annotations

import dataclasses

import torch

from actors.ray_actor import Whereabouts, check_same_code, whereabouts
from deploy.layout import Share
from deploy.learner_setup import LearnerSetup
from learner.group import LearnerGroup, join_store, use_loopback
from learner.update_loop import NEVER, Turn
from policy.allocator import keep_freed_memory


class LearnerActor:
    """One learner with its rollout workers; wrapped by ``ray.remote`` in ``deploy.ray_peers``."""

    def __init__(self, setup: LearnerSetup, share: Share, incarnation: int) -> None:
        check_same_code(setup.worker.package_root)
        keep_freed_memory()
        torch.set_num_threads(1)
        self._loop = setup.make_loop(share)
        self._pool = setup.make_pool(share, self._loop, incarnation)
        self._group: LearnerGroup | None = None

    def whereabouts(self) -> Whereabouts:
        """This process."""
        return whereabouts()

    def join(self, address: str, port: int, generation: int, rank: int, size: int, timeout_seconds: float) -> int:
        """Become a member of a new group and take over the run's weights; the policy version."""
        self._leave()
        use_loopback()
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
