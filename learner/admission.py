"""Admission: which actor may start an unroll now.

It keeps data fresh: an unroll may start only if, with everything that is ahead of it, it will be trained within
``max_policy_lag`` versions. No data is thrown away to keep up; a slow learner makes actors wait.
"""

from __future__ import annotations

from collections import Counter

from shoal.learner.mailbox import Mailbox


class Admission:
    """The unrolls under way; it holds no lock (``learner.trajectory_queue`` has one for all its parts).

    Args:
        num_actors: actors that share the admissions in lock step.
        num_envs: slots per unroll.
        batch_size: segments per update; a multiple of ``num_envs``.
        max_policy_lag: versions that may pass between acting and training; 0 is lock step.
    """

    def __init__(self, *, num_actors: int, num_envs: int, batch_size: int, max_policy_lag: int) -> None:
        self._num_envs, self._batch_size = num_envs, batch_size
        self.max_policy_lag = max_policy_lag
        # In lock step every actor makes the same number of unrolls per version: which data an update sees must not
        # depend on who was faster.
        self._quota = batch_size // (num_actors * num_envs) if max_policy_lag == 0 else None
        self._admitted: Counter[int] = Counter()
        self._begun: dict[int, int] = {}
        """The policy version of the unroll under way, by actor."""
        self._under_way = 0
        self._updating = False

    @property
    def lock_step(self) -> bool:
        """Whether every actor makes the same number of unrolls per version."""
        return self._quota is not None

    def admit(self, actor: int, policy_version: int, mailbox: Mailbox) -> bool:
        """Admit an unroll of ``actor`` with ``policy_version`` if it may start now; it is under way then.

        The trajectories in ``mailbox`` are trained before it.
        """
        if self._under_way == 0:
            # A refused delivery does not name its actor. Once all unrolls have come back, only the admissions that gave
            # a trajectory count; otherwise lock step would wait for ever for the one that was refused.
            self._admitted = Counter(mailbox.actors())
            self._begun.clear()
        ahead = len(mailbox) + self._under_way
        lag = self._updating + ((ahead + 1) * self._num_envs - 1) // self._batch_size
        if lag > self.max_policy_lag or (self._quota is not None and self._admitted[actor] >= self._quota):
            return False
        self._admitted[actor] += 1
        self._begun[actor] = policy_version
        self._under_way += 1
        return True

    def came_back(self) -> None:
        """An unroll under way was delivered; its actor is not known yet."""
        self._under_way -= 1

    def delivered(self, actor: int) -> None:
        """The delivery was a trajectory of ``actor``."""
        self._begun.pop(actor, None)

    def abandoned(self, actor: int) -> None:
        """The unroll of ``actor`` will never be delivered; its successor may make one instead."""
        self._under_way -= 1
        self._admitted[actor] -= 1
        self._begun.pop(actor, None)

    def update_began(self) -> None:
        """A batch was taken for an update: an unroll that starts now is trained one version later."""
        self._updating = True

    def published(self) -> None:
        """New weights are out; the update is over."""
        self._updating = False
        self._admitted.clear()

    def lags(self, policy_version: int) -> list[int]:
        """Policy lag of every unroll under way: the versions made since it began."""
        return [policy_version - begun for begun in self._begun.values()]
