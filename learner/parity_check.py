"""The log-prob parity check, the canary of the memory: the learner recomputes the actors' log-probabilities.

At lag 0 the update itself makes the comparison, in float32. Under lag, and for updates in bfloat16, the check makes it
with the weights that acted, which it keeps for as long as unrolls of theirs may come. It catches every fault of the
memory: a reset too late or too early, a state of another slot, stale weights, or other arithmetic in the actor.
"""

from __future__ import annotations

import copy

import torch
from shoal.learner.device import DevicePath
from shoal.learner.forward_pass import forward_pass, log_prob_error
from shoal.policy.recurrent_policy import RecurrentPolicy
from shoal.policy.weights import Weights, load_weights
from tensordict import TensorDict

TOLERANCE = 1e-4
"""Largest |difference| of float32 log-probabilities that rounding explains. A fault gives more than 1e-2, and less only
while the policy is still nearly uniform."""


class LogProbParityCheck:
    """Checks ``segments`` segments of every ``every``-th batch, each time others.

    Where updates are in bfloat16, whose rounding hides faults, it checks a share of them in every batch.
    """

    def __init__(
        self, policy: RecurrentPolicy, path: DevicePath, *, max_policy_lag: int, every: int = 8, segments: int = 8
    ) -> None:
        self._policy = copy.deepcopy(policy).requires_grad_(False)
        if not path.is_exact:  # then no update compares, so every batch is checked, with no more segments in all
            every, segments = 1, max(segments // every, 1)
        self._path, self._every, self._segments = path, every, segments
        self._keep = max_policy_lag + 1
        self._weights: dict[int, Weights] = {}
        self._calls = 0

    def remember(self, weights: Weights) -> None:
        """Keep a published version for as long as unrolls made with it may be trained."""
        self._weights[weights.policy_version] = weights
        while len(self._weights) > self._keep:
            del self._weights[min(self._weights)]

    @torch.no_grad()
    def check(self, batch: TensorDict) -> float | None:
        """The largest error of this call's segments; None where this batch is not checked."""
        self._calls += 1
        if self._calls % self._every:
            return None
        check = self._calls // self._every
        begin = check * self._segments % batch.shape[0]
        part = batch[begin : begin + self._segments]
        weights = self._weights.get(int(part["policy_version"][0]))
        if weights is None:
            return None
        load_weights(self._policy, weights)
        rows = part["policy_version"] == weights.policy_version
        with self._path.exact():
            log_prob = forward_pass(self._policy, part, self._path).log_prob
        return float(log_prob_error(log_prob, part, rows))
