"""The reset-aware unroll against stepping: the same numbers and gradients, whatever the resets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.learner.device_choice import NO_BFLOAT16, runs_bfloat16
from shoal.policy.recurrent import plan_resets, step_lstm, unroll_lstm
from torch import nn


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
@settings(max_examples=examples(80))
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 20),
    rows=st.integers(1, 9),
    rate=st.sampled_from([0, 0.02, 0.2, 0.7, 1]),
    final_rate=st.sampled_from([0, 0.5, 1]),
)
def test_unroll_equals_stepping(seed, steps, rows, rate, final_rate, return_state):
    """A reset one step late or early, a stored state given to a later episode, a held row that goes on, a final
    row that is valued with another state or changes its row's."""
    lstm, x, is_first, state, final = make_case(seed, steps, rows, rate, final_rate)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    s1, s2 = (tuple(part.clone().requires_grad_() for part in state) for _ in range(2))
    want, want_state = step_by_step(lstm, x1, is_first, s1, final)
    plan = plan_resets(is_first.numpy(), final)
    got, got_state = unroll_lstm(lstm, x2, plan, is_first, s2, return_state=return_state)
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


@pytest.mark.parametrize(
    ("steps", "rows", "rate"), [(1, 1, 1), (2, 1, 1), (1, 5, 0.5), (33, 16, 0.03), (12, 8, 1), (9, 3, 0), (7, 70, 0.9)]
)
@pytest.mark.parametrize("return_state", [False, True])
def test_the_float32_kernel_equals_stepping(steps, rows, rate, return_state):
    """A library's kernel whose closed gates are only nearly 0, or that lays out weights in another way: the double
    precision of the test above takes other code."""
    lstm, x, is_first, state, final = make_case(steps, steps, rows, rate, 0.5)
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(3)
        state[1].mul_(30)
    lstm, x, state = lstm.float(), x.float().requires_grad_(), tuple(part.float().requires_grad_() for part in state)
    want, want_state = step_by_step(lstm, x, is_first, state, final)
    plan = plan_resets(is_first.numpy(), final)
    got, got_state = unroll_lstm(lstm, x, plan, is_first, state, return_state=return_state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    inputs = [x, *state, *lstm.parameters()]
    sums = [want.square().sum(), got.square().sum()]
    if return_state:
        torch.testing.assert_close(got_state, want_state, rtol=1e-4, atol=1e-4)
        sums = [y + sum(p.sum() for p in s) for y, s in zip(sums, (want_state, got_state), strict=True)]
    grads = [torch.autograd.grad(y, inputs, materialize_grads=True, allow_unused=True) for y in sums]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_gradient_crosses_a_reset(dtype):
    """Credit flowing into another episode: a gate that is closed but for a rounding error lets it through."""
    if dtype == torch.bfloat16 and not runs_bfloat16("cpu"):
        pytest.skip(NO_BFLOAT16)
    lstm, x, is_first, state, _ = make_case(0, 8, 3, 0.0)
    is_first[4] = True
    wide = dtype if dtype == torch.float64 else torch.float32
    lstm, x, state = lstm.to(wide), x.to(wide).requires_grad_(), tuple(part.to(wide) * 1e6 for part in state)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, _ = unroll_lstm(lstm, x, plan_resets(is_first.numpy()), is_first, state, return_state=False)
    y[4 * 3 :].float().sum().backward()
    assert (x.grad[: 4 * 3] == 0).all()
    assert (x.grad[4 * 3 :] != 0).any()


def test_a_non_finite_state_dies_with_its_episode():
    """0 * inf: a reset by multiplication would poison the next episode."""
    lstm, x, is_first, state, _ = make_case(0, 4, 2, 0.0)
    is_first[0] = True
    state[1].fill_(float("inf"))
    y, _ = unroll_lstm(lstm, x, plan_resets(is_first.numpy()), is_first, state, return_state=False)
    assert y.isfinite().all()
