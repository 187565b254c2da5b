"""Everybody who acts in a run, whoever runs them: what the training loop drives, and metrics and progress count."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, get_args

from shoal.actors.pool import ActorState, Recoveries

if TYPE_CHECKING:  # Ray is imported where it is used
    from shoal.deploy.cluster.ray_peers import RayPeers


class Pool(Protocol):
    """Rollout workers, as ``actors.pool.InlinePool`` and ``actors.ray_pool.RayPool`` have them."""

    @property
    def restarts(self) -> Counter[str]:
        """Workers replaced, by reason."""

    @property
    def num_alive(self) -> int:
        """Workers that can make unrolls."""

    @property
    def states(self) -> Counter[ActorState]:
        """Workers by what they are at."""

    @property
    def recoveries(self) -> Recoveries:
        """How long replacements took."""

    def pump(self, timeout: float) -> None:
        """Make or collect unrolls."""

    def close(self) -> None:
        """End all."""


@dataclasses.dataclass(slots=True)
class WorkerGroup:
    """The rollout workers that feed the run's own learner, and the learners beside it with theirs."""

    pool: Pool
    drive: Callable[[float], None] | None
    """What makes the data where no other thread does."""
    peers: RayPeers | None = None

    @property
    def num_alive(self) -> int:
        """Rollout workers that can make unrolls."""
        return self.pool.num_alive + (self.peers.num_actors_alive if self.peers else 0)

    @property
    def states(self) -> dict[str, int]:
        """Rollout workers by what they are at; every state is there."""
        found = Counter[str](self.pool.states) + (self.peers.actor_states if self.peers else Counter())
        return {state: found[state] for state in get_args(ActorState)}

    @property
    def restarts(self) -> Counter[str]:
        """Actors, and learners that also act, replaced by reason."""
        return self.pool.restarts + (self.peers.restarts if self.peers else Counter())

    @property
    def recoveries(self) -> Recoveries:
        """Of the actors that feed the run's own learner, and of the learners beside it."""
        own = self.pool.recoveries
        if not self.peers:
            return own
        beside = self.peers.recoveries
        return Recoveries(own.count + beside.count, own.seconds + beside.seconds, max(own.slowest, beside.slowest))

    def close(self) -> None:
        """End all."""
        if self.peers:
            self.peers.close()
        self.pool.close()
