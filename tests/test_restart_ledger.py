"""What becomes of the steps that were in flight when the checkpoint was saved that a run goes on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rollouts import make_learner, small_policy
from shoal.deploy.training.resume import Origin, restore
from shoal.learner.checkpoint import Checkpoints
from shoal.learner.ledger import Ledger
from shoal.learner.statistics import RunStatistics


@pytest.mark.parametrize(
    ("saved", "dropped"),
    [
        ({"sampled": 20, "trained": 12, "in_flight": 5, "dropped": {"stale": 3}}, {"stale": 3, "restart": 5}),
        ({"sampled": 20, "trained": 12, "in_flight": 4, "dropped": {"restart": 4}}, {"restart": 8}),
        ({"sampled": 20, "trained": 20, "in_flight": 0, "dropped": {}}, {}),
    ],
)
def test_what_was_in_flight_is_booked(tmp_path: Path, saved: dict[str, Any], dropped: dict[str, int]) -> None:
    """Catches steps that are sampled and nowhere else after a resume, and those of resumes before, forgotten."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_learner(small_policy()), {"ledger": saved})
    worker: Any = SimpleNamespace(learner=make_learner(small_policy()), queue=SimpleNamespace(ledger=Ledger()))
    ledger = worker.queue.ledger
    restore(Origin(checkpoint=checkpoints.latest(), run_id="run", session=1), worker, RunStatistics(ledger))
    assert (ledger.sampled, ledger.trained, ledger.in_flight) == (20, saved["trained"], 0)
    assert dict(ledger.dropped) == dropped
    assert ledger.balance() == 0
    assert worker.learner.env_steps == saved["trained"]
