"""Adapts the learning rate to the size of the policy's steps (as in RSL-RL, Rudin et al. 2022, and rl_games)."""

from __future__ import annotations

from shoal.policy.actions import Actions

KL_OF_ONE = 0.01
"""``learner.desired_kl`` for each number or choice of an action."""
FALL, RISE = 1.5, 1.1
"""Least fall, and the rise, of the learning rate from one update to the next. It rises slowly: a policy that is nearly
sure of itself moves little for many updates, and then too far at a rate that has risen for as long."""
TOLERANCE = 2.0
"""A KL divergence within this factor of the desired one changes nothing."""
TOO_FAR = 10.0
"""An update ends before its next optimizer step once its KL divergence is above so many times the desired one."""
SMALLEST = 0.01
"""Smallest learning rate, as a part of the configured one, which is the largest: a policy that is sure of itself hardly
moves whatever its weights do, and a rate that rose until it did would undo what was learned."""


def default_desired_kl(actions: Actions) -> float:
    """``learner.desired_kl=auto``: the parts of an action are independent given the state, so their divergences add."""
    return KL_OF_ONE * len(actions.names)


class KLAdaptation:
    """The factor by which the learning rate is multiplied, from the KL divergence after each update.

    Args:
        desired_kl: KL divergence between the policies before and after an update, as its last pass finds it; 0 keeps
            the factor at 1. With one pass it is measured from the policy that acted, so the lag counts, too.
    """

    def __init__(self, desired_kl: float) -> None:
        self._desired_kl = desired_kl
        self.factor = 1.0

    def is_too_far(self, kl: float) -> bool:
        """Whether an update that has moved the policy by ``kl`` makes no further step."""
        return bool(self._desired_kl) and kl > TOO_FAR * self._desired_kl

    def end_update(self, kl: float) -> None:
        """Take in the KL divergence of an update's last pass."""
        if not self._desired_kl:
            return
        if kl > TOLERANCE * self._desired_kl:
            # The divergence of small steps grows with the square of their size.
            self.factor = max(self.factor / max(FALL, (kl / self._desired_kl) ** 0.5), SMALLEST)
        elif kl < self._desired_kl / TOLERANCE:
            self.factor = min(self.factor * RISE, 1.0)
