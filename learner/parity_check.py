"""The log-prob parity check, the canary of the memory: the learner recomputes the actors' log-probabilities.

At lag 0 the update itself gives the comparison, in float32. Under lag, and for updates in bfloat16, it is made with the
weights that acted, which are kept for as long as they can still come back. It catches every fault of the memory: a
reset late or early, a state of another slot, a stale weight buffer, another arithmetic in the actor.
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
"""Largest |difference| of float32 log-probabilities that rounding explains. A fault gives more than 1e-2, less
only while the policy is still nearly uniform."""


class LogProbParityCheck:
    """Checks ``segments`` of a lagged batch, each time others, every ``every`` updates; where updates are in bfloat16,
    whose rounding hides what it looks for, a share of them in every batch, lagged or not."""

    def __init__(
        self, policy: RecurrentPolicy, path: DevicePath, *, max_policy_lag: int, every: int = 8, segments: int = 8
    ) -> None:
        self._policy = copy.deepcopy(policy).requires_grad_(False)
        if not path.is_exact:  # no update compares then, so every batch is looked at, at no more segments in all
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
        """The largest error of this call's segments; None where it was not this batch's turn."""
        self._calls += 1
        if self._calls % self._every:
            return None
        turn = self._calls // self._every
        begin = turn * self._segments % batch.shape[0]
        part = batch[begin : begin + self._segments]
        weights = self._weights.get(int(part["policy_version"][0]))
        if weights is None:
            return None
        load_weights(self._policy, weights)
        rows = part["policy_version"] == weights.policy_version
        with self._path.exact():
            log_prob = forward_pass(self._policy, part, self._path).log_prob
        return float(log_prob_error(log_prob, part, rows))
