"""Keeps the value loss from drowning the policy's in the layers that both reach, the memory above all."""

from __future__ import annotations

import math
from collections.abc import Mapping

VALUE_COEF = 0.5
"""``learner.value_coef=auto`` while the value's gradient is small enough."""
EVERY = 20
"""Updates between readings, each of which takes about as long as an eighth of a default update on a CPU."""
MOST = 2.0
"""Largest gradient of the value loss, as a multiple of the policy's."""
FALL, RISE = 4.0, 1.25
"""Largest fall and rise of the coefficient from one reading to the next: readings of a few segments are noisy."""
SMALLEST = 0.01
"""Smallest factor: a policy that is sure of itself has no gradient to be drowned."""


class ValueBalance:
    """The factor by which ``value_coef`` is multiplied, from readings of ``Learner.gradient_norms``.

    Adam divides by the size of gradients, so a head that the value loss alone reaches learns as fast with any factor.

    Args:
        is_on: without it the factor stays at 1.
    """

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self.factor = 1.0

    def is_due(self, policy_version: int) -> bool:
        """Whether the update that begins with these weights takes a reading."""
        return self._is_on and policy_version % EVERY == 0

    def end_update(self, norms: Mapping[str, float]) -> None:
        """Take in a reading, ``policy`` and ``value`` (times its coefficient); one that is empty changes nothing."""
        policy, value = (norms.get(loss, math.nan) for loss in ("policy", "value"))
        if not (math.isfinite(policy) and math.isfinite(value)):
            return
        wanted = MOST * policy / value if value else math.inf
        self.factor = min(max(self.factor * min(max(wanted, 1 / FALL), RISE), SMALLEST), 1.0)
