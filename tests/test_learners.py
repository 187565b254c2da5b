"""The books of several learners, one of which ends in the middle of an update."""

from __future__ import annotations

from collections import Counter

import pytest
from shoal.learner.learners import take_trained
from shoal.learner.ledger import Ledger


@pytest.mark.parametrize(
    ("waiting", "batches", "since"),
    [
        pytest.param({"a": 30}, {"a": 20}, {}, id="all of it waited"),
        pytest.param({"a": 5}, {"a": 20}, {"a": 15}, id="a part came after the last report"),
        pytest.param({}, {"a": 20}, {"a": 20}, id="nothing waited: it acts itself"),
        pytest.param({"a": 20, "b": 20}, {"a": 20, "b": 20}, {}, id="two at once"),
        pytest.param({"a": 20, "b": 4}, {"a": 20, "b": 20}, {"b": 16}, id="two at once, one short"),
        pytest.param({"a": 0}, {"a": 0}, {}, id="an update without steps"),
    ],
)
@pytest.mark.parametrize("others", [{}, {"c": 7}])
def test_steps_of_a_peer_that_ended_after_the_update_are_counted_once(
    waiting: dict[str, int], batches: dict[str, int], since: dict[str, int], others: dict[str, int]
) -> None:
    """Catches steps that waited at a peer, were trained with it, and are in the books twice: once as lost with it, once
    as sampled and trained. The reference counts every step by itself.
    """
    steps = [(peer, i) for peer in waiting for i in range(waiting[peer])]
    steps += [(peer, waiting.get(peer, 0) + i) for peer in since for i in range(since[peer])]
    trained = {(peer, i) for peer, batch in batches.items() for i in range(batch)}
    assert trained <= set(steps)
    at_peers = Counter(waiting | others)
    ledger = Ledger(sampled=at_peers.total(), in_flight=at_peers.total())

    ledger.add(take_trained(at_peers, list(batches), sum(batches.values())))
    for peer in batches:  # which are gone, with all that still waits there
        ledger.add(Ledger(in_flight=-at_peers[peer], dropped=Counter(learner_lost=at_peers.pop(peer))))

    assert ledger.trained == len(trained)
    assert ledger.sampled == len(steps) + sum(others.values())
    assert ledger.dropped["learner_lost"] == len(steps) - len(trained)
    assert ledger.in_flight == sum(others.values()) == at_peers.total()
    assert ledger.balance() == 0
