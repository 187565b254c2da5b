"""Sampling and the numbers of distributions, against references in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from shoal.policy.actions import Continuous, Discrete


def names(count):
    return (tuple(map(str, range(count))),)


@pytest.fixture(scope="module")
def rows():
    """Logits [2000, 18], and the float32 sums of their probabilities."""
    logits = torch.randn(2000, 18, generator=torch.Generator().manual_seed(0)) * 3
    return logits, logits.log_softmax(-1).exp().cumsum(-1)[:, -1]


def test_what_rounding_lacks_goes_to_the_most_probable_action(rows):
    """The last action, however improbable it is, where the float32 sum of all ends below u."""
    logits, sums = rows
    short = sums < 1
    assert 0.1 < short.float().mean() < 0.6
    action, log_prob = Discrete(names(18)).sample(logits, torch.ones(len(logits), 1))
    assert torch.equal(action[short], logits.argmax(-1)[short])
    assert torch.equal(log_prob, logits.log_softmax(-1).gather(-1, action[:, None])[:, 0])


def test_an_impossible_last_action_is_never_sampled(rows):
    """A masked action that rounding takes."""
    logits, _ = rows
    logits = torch.cat([logits, torch.full((len(logits), 1), -math.inf)], 1)
    for uniform in (1.0, 1 - 2**-24):
        action, log_prob = Discrete(names(19)).sample(logits, torch.full((len(logits), 1), uniform))
        assert int(action.max()) < 18
        assert log_prob.isfinite().all()


def test_every_choice_of_several_falls_back_by_itself(rows):
    """An index that belongs to another choice, or the fallback of the first one taken for all."""
    logits, sums = rows
    joined = torch.cat([torch.zeros(len(logits), 4), logits], 1)
    action, _ = Discrete((tuple("abcd"), names(18)[0]), scalar=False).sample(joined, torch.ones(len(logits), 2))
    assert (action[:, 0] == 3).all()  # four quarters are exactly 1
    assert torch.equal(action[sums < 1, 1], logits.argmax(-1)[sums < 1])


def test_sampling_inverts_the_distribution_function(rows):
    """The first or the last action that is never sampled; any that is sampled too often."""
    logits, _ = rows
    uniform = 1 - torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(1))
    action, _ = Discrete(names(18)).sample(logits, uniform)
    exact = np.exp(logits.double().log_softmax(-1).numpy()).cumsum(-1)
    expected = (exact < uniform.double().numpy()).sum(-1)
    near = np.abs(exact - uniform.double().numpy()).min(-1) < 1e-6
    assert near.mean() < 0.01
    assert (action.numpy() == expected)[~near].all()
    many = torch.zeros(40_000, 5)
    action, _ = Discrete(names(5)).sample(many, 1 - torch.rand(40_000, 1, generator=torch.Generator().manual_seed(2)))
    counts = torch.bincount(action, minlength=5)
    assert (counts - 8000).abs().max() < 5 * math.sqrt(40_000 * 0.2 * 0.8)


def test_log_probabilities_and_entropies_are_those_of_torch(rows):
    """An entropy that lacks 0.5 for each dimension; a sum over the wrong dimension."""
    logits, _ = rows
    discrete = torch.distributions.Categorical(logits=logits.double())
    action = logits.argmin(-1)
    log_prob, entropy = Discrete(names(18)).evaluate(logits, action)
    torch.testing.assert_close(log_prob.double(), discrete.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), discrete.entropy(), rtol=1e-5, atol=1e-5)
    mean, log_std = logits[:, :3], logits[:, 3:6] / 3
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    moved = mean + 0.7 * log_std.exp()
    log_prob, entropy = Continuous(("x", "y", "z")).evaluate(torch.cat([mean, log_std], -1), moved)
    torch.testing.assert_close(log_prob.double(), normal.log_prob(moved.double()).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy.double(), normal.entropy().sum(-1), rtol=1e-5, atol=1e-5)
