"""The ledger: every environment step that was sampled is trained, in flight or dropped for a named reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

DropReason = Literal["stale", "non_finite", "learner_lost", "shutdown", "restart"]
"""Why delivered steps are never trained. ``stale``: they arrived too late. ``non_finite``: their update was skipped.
``learner_lost``: a peer learner ended with them. ``shutdown``: they waited when the run ended. ``restart``: they waited
when the checkpoint was saved from which the run was resumed."""


@dataclasses.dataclass(slots=True)
class Ledger:
    """Environment steps (valid transitions). Each number is counted where it happens, none derived from the others."""

    sampled: int = 0
    """Delivered by actors."""
    trained: int = 0
    """Used in an update, counted from the mask of its loss."""
    in_flight: int = 0
    """Delivered and waiting for their update."""
    dropped: Counter[DropReason] = dataclasses.field(default_factory=Counter)
    """Delivered and not trained, by reason."""

    def add(self, other: Ledger) -> None:
        """Add the counts of another ledger."""
        self.sampled += other.sampled
        self.trained += other.trained
        self.in_flight += other.in_flight
        self.dropped.update(other.dropped)

    def since(self, before: Ledger) -> Ledger:
        """The counts added since ``before``, an earlier copy of this ledger."""
        reasons = self.dropped.keys() | before.dropped.keys()
        return Ledger(
            self.sampled - before.sampled,
            self.trained - before.trained,
            self.in_flight - before.in_flight,
            Counter({r: steps for r in reasons if (steps := self.dropped[r] - before.dropped[r])}),
        )

    def balance(self) -> int:
        """sampled - (trained + in_flight + dropped); 0 when every step is accounted for."""
        return self.sampled - self.trained - self.in_flight - sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data for the summary and checkpoints."""
        return {
            "sampled": self.sampled,
            "trained": self.trained,
            "in_flight": self.in_flight,
            "dropped": dict(sorted(self.dropped.items())),
        }
