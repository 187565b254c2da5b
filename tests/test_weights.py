"""Weights on the wire."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from rollouts import small_policy
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.weights import WeightsError, flatten_weights, load_weights


def test_round_trip():
    """Parameters in another order on the other side, a buffer that changes as the policy trains on."""
    source, target = small_policy(0), small_policy(1)
    weights = flatten_weights(source, 7)
    assert weights.policy_version == 7
    assert weights.flat.dtype == np.float32
    weights.verify()
    load_weights(target, weights)
    torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert flatten_weights(target, 7).sha256 == weights.sha256
    before = weights.flat.copy()
    with torch.no_grad():
        for p in (*source.parameters(), *target.parameters()):
            p.zero_()
    np.testing.assert_array_equal(weights.flat, before)


def test_a_read_only_buffer_is_loaded_without_a_warning():
    """Ray's object store hands out read-only memory; a warning is an error here."""
    weights = flatten_weights(small_policy(0), 1)
    weights.flat.flags.writeable = False
    target = small_policy(1)
    load_weights(target, weights)
    assert flatten_weights(target, 1).sha256 == weights.sha256


def test_a_changed_buffer_is_refused():
    """An actor that plays with weights nobody published."""
    weights = flatten_weights(small_policy(), 3)
    weights.flat[1000] += 1e-7
    with pytest.raises(WeightsError, match="version 3: expected content hash"):
        weights.verify()


@pytest.mark.parametrize("change", [lambda flat: flat[:-1], lambda flat: np.append(flat, np.float32(0))])
def test_a_buffer_of_another_size_is_refused(change):
    """A part of the weights loaded, the rest left as it was."""
    policy = small_policy(1)
    before = flatten_weights(policy, 0).sha256
    weights = flatten_weights(small_policy(), 3)
    with pytest.raises(WeightsError, match=r"version 3: expected \d+ parameters, got \d+"):
        load_weights(policy, dataclasses.replace(weights, flat=change(weights.flat)))
    assert flatten_weights(policy, 0).sha256 == before


def test_equal_seeds_give_equal_weights():
    """Initialisation that depends on anything but the seed."""
    hashes = set()
    for _ in range(2):
        torch.manual_seed(4)
        hashes.add(flatten_weights(FastPolicy(VectorObservation(3), ["a"]), 0).sha256)
    assert len(hashes) == 1
