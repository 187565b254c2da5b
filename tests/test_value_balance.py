"""The value loss gives way where its gradient would drown the policy's in the layers that both reach."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from rollouts import make_learner, random_batch, small_policy
from shoal.learner.value_balance import EVERY, FALL, MOST, RISE, SMALLEST, VALUE_COEF, ValueBalance
from shoal.policy.weights import flatten_weights

SEVERAL: dict[str, Any] = {"epochs": 2, "minibatches": 2, "learning_rate": 1e-2}


def test_the_factor_settles_where_the_values_gradient_is_in_bounds() -> None:
    """Catches a factor that goes on falling, that does not come back, or that leaves its bounds."""
    balance = ValueBalance(is_on=True)
    for _ in range(20):
        balance.end_update({"policy": 0.01, "value": 0.5 * balance.factor})
    assert balance.factor == pytest.approx(MOST * 0.01 / 0.5)
    seen = [balance.factor]
    for _ in range(40):
        balance.end_update({"policy": 1.0, "value": 0.5 * balance.factor})
        seen.append(balance.factor)
    assert balance.factor == 1.0
    assert all(after <= RISE * before for before, after in itertools.pairwise(seen))
    balance.end_update({"policy": 0.0, "value": 1.0})
    assert balance.factor == 1 / FALL
    for _ in range(20):
        balance.end_update({"policy": 0.0, "value": 1.0})
    assert balance.factor == SMALLEST


@pytest.mark.parametrize(
    "norms", [{}, {"policy": math.nan, "value": 1.0}, {"policy": 1.0, "value": math.inf}], ids=["none", "nan", "inf"]
)
def test_what_was_not_measured_changes_nothing(norms: dict[str, float]) -> None:
    """Catches a policy without shared layers whose value is never learned, and a factor that is NaN for ever."""
    balance = ValueBalance(is_on=True)
    balance.factor = 0.25
    balance.end_update(norms)
    assert balance.factor == 0.25


def test_a_value_that_drowns_the_policy_weighs_less_in_the_next_update() -> None:
    """Catches a factor that never reaches the loss, or does so within an update, which could not be made again."""
    learner = make_learner(small_policy(), value_coef="auto", **SEVERAL)
    batch = random_batch(0, num_slots=8)
    batch["reward"] *= 100  # in units of the reward, so that the value's gradient is larger
    norms = learner.gradient_norms(batch)
    assert norms["value"] > 3 * MOST * norms["policy"]
    first = learner.update(batch)
    assert first.scheduled.value_coef == VALUE_COEF
    assert learner.value_balance.factor == pytest.approx(max(MOST * norms["policy"] / norms["value"], 1 / FALL))
    assert learner.update(batch).scheduled.value_coef == VALUE_COEF * learner.value_balance.factor
    before = learner.value_balance.factor
    while learner.policy_version % EVERY:
        learner.update(batch)
    assert learner.value_balance.factor == before
    learner.update(batch)
    assert learner.value_balance.factor != before


def test_a_coefficient_that_is_given_stays() -> None:
    """Catches a setting of the user's that changes by itself, and one whose factor costs anything."""
    learner = make_learner(small_policy(), value_coef=5.0, weight_metrics_every=0, **SEVERAL)
    batch = random_batch(0, num_slots=8)
    batch["reward"] *= 100
    for _ in range(2):
        result = learner.update(batch)
        assert result.scheduled.value_coef == 5.0
        assert result.gradient_norms == {}


def test_metrics_of_weights_do_not_change_what_is_learned() -> None:
    """Catches a factor that moves with ``learner.weight_metrics_every``."""
    weights = set()
    for every in (0, 1, 3):
        learner = make_learner(small_policy(), value_coef="auto", weight_metrics_every=every, **SEVERAL)
        for seed in range(4):
            learner.update(random_batch(seed))
        weights.add(flatten_weights(learner.policy, 0).sha256)
    assert len(weights) == 1


def test_the_factor_is_state_that_learners_share() -> None:
    """Catches a learner that joins, or an update that is made again, with another factor."""
    learner = make_learner(small_policy(), value_coef="auto", **SEVERAL)
    learner.value_balance.factor = 0.125
    other = make_learner(small_policy(seed=1), value_coef="auto", **SEVERAL)
    other.load_shared_state(learner.shared_state())
    batch = random_batch(0)
    torch.manual_seed(0)
    results = [each.update(batch) for each in (learner, other)]
    assert [result.scheduled.value_coef for result in results] == [VALUE_COEF * 0.125] * 2
    assert len({flatten_weights(each.policy, 0).sha256 for each in (learner, other)}) == 1
