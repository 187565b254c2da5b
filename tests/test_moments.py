"""Sums over valid transitions against numpy in float64, on the valid rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from shoal.learner.moments import Moments, sum_moments
from shoal.learner.vtrace import Targets


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_void_transitions_count_nowhere(share: float, offset: float) -> None:
    """Catches void rows in the explained variance or in the spread of advantages: they fit perfectly, being their own
    target, or pull the means to nought.
    """
    generator = torch.Generator().manual_seed(3)
    vs, advantage, noise = (torch.randn(12, 5, generator=generator) + offset for _ in range(3))
    valid = torch.rand(12, 5, generator=generator) >= share
    value = torch.where(valid, 0.6 * vs + 0.3 * noise, vs)  # a void row is its own target
    moments = Moments(*sum_moments(Targets(vs=vs, advantage=advantage), value, valid).tolist())
    kept = valid.numpy()
    expected = 1 - np.var((vs - value).double().numpy()[kept]) / np.var(vs.double().numpy()[kept])
    assert moments.transitions == kept.sum()
    assert moments.explained_variance == pytest.approx(expected, abs=1e-6)
    assert moments.advantage_std == pytest.approx(np.std(advantage.double().numpy()[kept]), rel=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1.0, 1000.1])
def test_targets_that_do_not_vary_explain_nothing(constant: float) -> None:
    """Catches values said to explain a million times the targets' variance, which is the rounding of their squares."""
    vs = torch.full((12, 5), constant)
    value = vs + torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    moments = Moments(*sum_moments(Targets(vs=vs, advantage=vs), value, torch.ones(12, 5, dtype=torch.bool)).tolist())
    assert np.isnan(moments.explained_variance)
