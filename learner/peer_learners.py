"""What a run's own learner needs of the learners beside it, which make every update together with it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from shoal.learner.learner import Learner
from shoal.learner.update_step import StepResult


class Peers(Protocol):
    """The other learners. Each acts on slots of its own, or is fed by actors of its own, and starts an update only when
    it is told to."""

    def begin(self, learner: Learner, stop: threading.Event) -> None:
        """Start their part in the next update; before it, whoever came or went, the group is made anew.

        waits for: at the run's start all of them     unblocked by: ``stop``
        """

    def end(self) -> Sequence[StepResult]:
        """What they did in the update that was begun.

        waits for: their answers     unblocked by: an answer, a death, or the time limit of an unroll
        """

    def separate(self, learner: Learner) -> None:
        """Leave the group, so that nobody waits for what will not come; the next update makes another."""
