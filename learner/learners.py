"""All learners of a run behind one call: one, or several that make every update together."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from shoal.learner.learner import Learner
from shoal.learner.learner_worker import LearnerWorker, Lost, StepResult, Trained
from shoal.learner.ledger import DropReason, Ledger
from shoal.learner.recorder import Recorded

log = logging.getLogger(__name__)

Peer = TypeVar("Peer")


class Learners(Protocol):
    """The learners, as the training loop calls them."""

    @property
    def worker(self) -> LearnerWorker:
        """The learner of the run's own process; its weights are the run's weights."""

    def step(self, stop: threading.Event) -> StepResult | None:
        """One update of all learners; None where ``stop`` was set before it began, or the others are out of reach."""

    def recorded(self, attempts: Collection[int]) -> Sequence[Recorded]:
        """The peer learners' parts in these updates, as far as they have them; between two updates, or after an error
        in one."""


@dataclasses.dataclass(kw_only=True, slots=True)
class OneLearner:
    """The only learner of a run."""

    worker: LearnerWorker
    drive: Callable[[float], None] | None
    """Makes the data where no other thread does."""

    def step(self, stop: threading.Event) -> StepResult | None:
        """One update."""
        return self.worker.step(self.drive, stop)

    def recorded(self, attempts: Collection[int]) -> Sequence[Recorded]:
        """None: there are no peers."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeerResult:
    """A peer learner's part in one update, and its other counts since the update before."""

    step: StepResult
    ledger: Ledger
    """Steps that were sampled or dropped outside this update, such as those of unrolls for later updates."""
    lost_unrolls: int
    """Unrolls that were begun and never delivered."""
    replaced: tuple[tuple[str, str], ...]
    """The rollout workers that were replaced: for each the reason in a word, and in a sentence."""
    num_alive: int
    """Rollout workers that can make unrolls."""
    lags: tuple[int, ...]
    """Policy lag of every unroll under way: the versions made since it began."""
    late_unrolls: int
    """Unrolls under way that will be too old to be trained when they come back."""


class PeerLearners(Protocol):
    """The learners of the other processes.

    Each acts on slots of its own, or is fed by actors of its own, and starts an update only when it is called.
    """

    @property
    def out_of_reach(self) -> threading.Event:
        """Set when nobody can be reached any more, and nobody waits for this learner."""

    def begin(self, learner: Learner, stop: threading.Event, env_options: Mapping[str, Any] | None) -> None:
        """Start the peers' part in the next update; if a peer came or went, make a new group before it.

        ``env_options`` go with the weights that they publish after it. Where they are out of reach, nothing is begun.

        waits for: at the run's start all of them     unblocked by: ``stop``
        """

    def end(self) -> Sequence[PeerResult]:
        """The peers' results of the update that was begun.

        waits for: their answers     unblocked by: an answer, a death, or the time limit of an unroll
        """

    def unreported(self, trained: int) -> Ledger:
        """The counts of ``trained`` steps of the last update whose peers ended before they could report them."""

    def recorded(self, learner: Learner, attempts: Collection[int]) -> Sequence[Recorded]:
        """The peers' parts in these updates, of those that answer soon; after an error in an update the group is left.

        waits for: their answers     unblocked by: an answer, a death, or a time limit of seconds
        """

    def separate(self, learner: Learner) -> None:
        """Leave the group, so that no member waits for a lost one; the next update makes a new group."""


@dataclasses.dataclass(kw_only=True, slots=True)
class SeveralLearners:
    """The run's own learner and its peers, which make every update together."""

    worker: LearnerWorker
    drive: Callable[[float], None] | None
    peers: PeerLearners

    def step(self, stop: threading.Event) -> StepResult | None:
        """One update; the result has the reports of all learners, and the ledger of the own one.

        Steps that peers sampled, trained and dropped are added to the own queue's ledger.
        """
        worker, peers, queue = self.worker, self.peers, self.worker.queue
        with worker.clock.mark("peers"):
            peers.begin(worker.learner, stop, worker.env_options)
        # The peers have begun and wait for this learner, so ``stop`` waits for the end of the update.
        own = worker.step(self.drive, peers.out_of_reach)
        if own is None:
            return None
        lost = isinstance(own.outcome, Lost)
        if lost:
            peers.separate(worker.learner)
        reports, errors, trained = list(own.reports), list(own.log_prob_errors), own.ledger.trained
        with worker.clock.mark("peers"):
            answers = peers.end()
        for peer in answers:
            reports += peer.step.reports
            errors += peer.step.log_prob_errors
            steps = reconcile(own, peer.step)
            trained += steps.trained
            queue.add(steps)
            queue.add(peer.ledger)
            queue.add_episodes(peer.step.reports)
            queue.add_lost_unrolls(peer.lost_unrolls)
            if not lost and isinstance(peer.step.outcome, Lost):
                peers.separate(worker.learner)
            elif not lost and peer.step.weights_hash != own.weights_hash:
                log.error(
                    "two learners have different weights after one update; training goes on with the run's own weights"
                )
                peers.separate(worker.learner)
        if isinstance(own.outcome, Trained) and (missing := own.outcome.all_env_steps - trained):
            # A peer that ended between the update and its answer reported nothing, but its steps were trained.
            queue.add(peers.unreported(missing))
        return dataclasses.replace(own, reports=tuple(reports), log_prob_errors=tuple(errors))

    def recorded(self, attempts: Collection[int]) -> Sequence[Recorded]:
        """The parts of the peers in these updates."""
        return self.peers.recorded(self.worker.learner, attempts)


def reconcile(own: StepResult, peer: StepResult) -> Ledger:
    """The steps of a peer's part in an update, counted as the update ended for the run's own learner.

    One of them may have made the step when the other lost it. Training goes on with the own weights: the steps that are
    in them were trained, and no others, whatever the peer says.
    """
    if type(peer.outcome) is type(own.outcome):
        return peer.ledger
    steps = peer.ledger.sampled
    if isinstance(own.outcome, Trained):
        return Ledger(sampled=steps, trained=steps)
    reason: DropReason = "learner_lost" if isinstance(own.outcome, Lost) else "non_finite"
    return Ledger(sampled=steps, dropped=Counter({reason: steps}))


def take_trained(waiting: Counter[Peer], ended: Collection[Peer], trained: int) -> Ledger:
    """The counts of ``trained`` steps of peers that ended before they could report them.

    What waited at these peers is in the ledger as in flight, and is trained before what came later: it is taken out of
    ``waiting`` and counted as trained, not sampled a second time. Only the rest was never reported.
    """
    taken = 0
    for peer in ended:
        steps = min(waiting[peer], trained - taken)
        waiting[peer] -= steps
        taken += steps
    return Ledger(sampled=trained - taken, trained=trained, in_flight=-taken)
