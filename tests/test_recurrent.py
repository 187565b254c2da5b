"""The reset-aware unroll against stepping: the same numbers and gradients, whatever the resets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from policy.recurrent import plan_fragments, step_lstm, unroll_lstm


def step_by_step(lstm, x, is_first, state, final):
    """The slow, obvious reference: outputs of all steps [T, B, H] and of the final rows [K, H], the last state."""
    steps, rows = is_first.shape
    outputs, finals = [], [None] * len(final[0])
    for t in range(steps):
        y, state = step_lstm(lstm, x[t * rows : (t + 1) * rows], is_first[t], state)
        outputs.append(y)
        for k in np.flatnonzero(final[0] == t):
            b = final[1][k]
            one = tuple(part[:, b : b + 1] for part in state)
            row = x[steps * rows + k][None]
            finals[k] = step_lstm(lstm, row, torch.zeros(1, dtype=torch.bool), one)[0][0]
    return torch.cat([*outputs, *([torch.stack(finals)] if finals else [])]), state


def make_case(seed, steps, rows, rate, final_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    lstm = nn.LSTM(5, 6, num_layers=2).double()
    is_first = torch.rand(steps, rows, generator=generator) < rate
    ends = is_first[1:] & (torch.rand(steps - 1, rows, generator=generator) < final_rate)
    final = tuple(part.numpy() for part in ends.nonzero(as_tuple=True))
    x = torch.randn(steps * rows + len(final[0]), 5, generator=generator, dtype=torch.float64)
    state = tuple(torch.randn(2, rows, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return lstm, x, is_first, state, final


@pytest.mark.parametrize("return_state", [False, True])
@settings(max_examples=examples(80), deadline=None)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 20),
    rows=st.integers(1, 9),
    rate=st.sampled_from([0, 0.02, 0.2, 0.7, 1]),
    final_rate=st.sampled_from([0, 0.5, 1]),
)
def test_unroll_equals_stepping(seed, steps, rows, rate, final_rate, return_state):
    """A reset one step late or early, a stored state given to a later fragment, padding that reaches an output, a final
    row that is valued with another state or changes its row's."""
    lstm, x, is_first, state, final = make_case(seed, steps, rows, rate, final_rate)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    s1, s2 = (tuple(part.clone().requires_grad_() for part in state) for _ in range(2))
    want, want_state = step_by_step(lstm, x1, is_first, s1, final)
    plan = plan_fragments(is_first.numpy(), final)
    got, got_state = unroll_lstm(lstm, x2, plan, is_first[0], s2, return_state=return_state)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    targets = [(want * weight).sum(), (got * weight).sum()]
    if return_state:
        for got_part, want_part in zip(got_state, want_state, strict=True):
            torch.testing.assert_close(got_part, want_part)
        targets = [targets[0] + sum(p.sum() for p in want_state), targets[1] + sum(p.sum() for p in got_state)]
    parameters = list(lstm.parameters())
    want_grads = torch.autograd.grad(targets[0], [x1, *s1, *parameters], allow_unused=True)
    got_grads = torch.autograd.grad(targets[1], [x2, *s2, *parameters], allow_unused=True)
    for got_grad, want_grad, of in zip(got_grads, want_grads, [x, *state, *parameters], strict=True):
        zero = torch.zeros_like(of)
        torch.testing.assert_close(zero if got_grad is None else got_grad, zero if want_grad is None else want_grad)


def test_no_gradient_crosses_a_reset():
    """Credit flowing into another episode."""
    lstm, x, is_first, state, _ = make_case(0, 8, 3, 0.0)
    is_first[4] = True
    x.requires_grad_()
    y, _ = unroll_lstm(lstm, x, plan_fragments(is_first.numpy()), is_first[0], state, return_state=False)
    y[4 * 3 :].sum().backward()
    assert (x.grad[: 4 * 3] == 0).all()
    assert (x.grad[4 * 3 :] != 0).any()


def test_a_non_finite_state_dies_with_its_episode():
    """0 * inf: a reset by multiplication would poison the next episode."""
    lstm, x, is_first, state, _ = make_case(0, 4, 2, 0.0)
    is_first[0] = True
    state[1].fill_(float("inf"))
    y, _ = unroll_lstm(lstm, x, plan_fragments(is_first.numpy()), is_first[0], state, return_state=False)
    assert y.isfinite().all()


@pytest.mark.parametrize("max_buckets", [1, 2, 4])
def test_bucket_choice_is_the_cheapest(max_buckets):
    """A dynamic programme that is off by one pads far more than it must."""
    from itertools import combinations

    from policy.recurrent import STEP_COST_IN_ROWS, _choose_buckets

    rng = np.random.default_rng(3)
    for _ in range(40):
        lengths = np.sort(rng.integers(1, 30, rng.integers(1, 9)))[::-1]

        def cost(ranges, lengths=lengths):
            return sum(lengths[i] * (j - i + STEP_COST_IN_ROWS) for i, j in ranges)

        n = len(lengths)
        every = [
            list(zip((0, *cuts), (*cuts, n), strict=True))
            for k in range(min(max_buckets, n))
            for cuts in combinations(range(1, n), k)
        ]
        chosen = _choose_buckets(lengths, max_buckets)
        assert len(chosen) <= max_buckets
        assert cost(chosen) == min(map(cost, every))
