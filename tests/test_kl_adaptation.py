"""The learning rate follows the size of the policy's steps."""

from __future__ import annotations

import pytest
from rollouts import make_learner, random_batch, small_policy
from shoal.learner.forward_pass import valid_transitions
from shoal.learner.kl_adaptation import SMALLEST, KLAdaptation, default_desired_kl
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.actions import Actions, Continuous, Discrete


def test_the_rate_falls_fast_and_rises_slowly_within_its_bounds() -> None:
    """Catches a rate that rises above the configured one, falls to nothing, or rises as fast as it falls."""
    adaptation = KLAdaptation(0.01)
    for kl in (0.019, 0.006):
        adaptation.end_update(kl)
        assert adaptation.factor == 1.0
    adaptation.end_update(0.0)
    assert adaptation.factor == 1.0
    adaptation.end_update(0.16)
    assert adaptation.factor == pytest.approx(1 / 4)
    adaptation.factor = 1.0
    falls = 0
    while adaptation.factor > SMALLEST:
        adaptation.end_update(0.021)
        falls += 1
    adaptation.end_update(1e9)
    assert adaptation.factor == SMALLEST
    rises = 0
    while adaptation.factor < 1.0:
        adaptation.end_update(0.004)
        rises += 1
    assert rises > 3 * falls
    fixed = KLAdaptation(0.0)
    fixed.end_update(1e9)
    assert fixed.factor == 1.0


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (Discrete((("a", "b", "c"),)), 0.01),
        (Discrete((("a", "b"), ("c", "d")), scalar=False), 0.02),
        (Continuous(("x",)), 0.01),
        (Continuous(tuple("uvwxyz")), 0.06),
    ],
    ids=str,
)
def test_every_part_of_an_action_may_move_as_far(actions: Actions, expected: float) -> None:
    """Catches robots of many joints that learn slowly, because the divergence of an action is the sum of its parts'."""
    assert default_desired_kl(actions) == pytest.approx(expected)
    policy = FastPolicy(VectorObservation(3), actions)
    found = make_learner(policy, desired_kl="auto").config.desired_kl
    assert found == pytest.approx(expected)
    assert make_learner(policy, desired_kl=0.5).config.desired_kl == 0.5


@pytest.mark.parametrize(("desired", "direction"), [(1e-12, "falls"), (1e6, "stays")])
def test_the_next_update_is_made_with_the_rate_that_follows(desired: float, direction: str) -> None:
    """Catches a divergence that is measured and has no effect, or has it within the update that it is measured in."""
    learner = make_learner(small_policy(), desired_kl=desired, learning_rate=1e-3, epochs=2)
    rates = []
    for seed in range(3):
        learner.update(random_batch(seed))
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates[0] == 1e-3
    assert rates[1:] == pytest.approx([1e-3 * SMALLEST if direction == "falls" else 1e-3] * 2)


@pytest.mark.parametrize(("desired", "steps"), [(1e-9, 2), (1e6, 8), (0.0, 8)])
def test_an_update_that_has_gone_too_far_stops(desired: float, steps: int) -> None:
    """Catches an update that goes on however far it has moved the policy, and segments that are never trained on."""
    learner = make_learner(small_policy(), desired_kl=desired, learning_rate=1e-2, epochs=4, minibatches=2)
    batch = random_batch(0)
    result = learner.update(batch)
    assert result.optimizer_steps == steps
    assert result.env_steps == result.all_env_steps == int(valid_transitions(batch).sum())
