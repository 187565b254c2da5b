"""Every core's unroll against stepping: the same numbers and gradients, whatever the resets; and cores of a user's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from own_cores import faulty
from shoal.given import cores as cores_given
from shoal.learner.device_choice import NO_BFLOAT16, runs_bfloat16
from shoal.policy import FastPolicy, VectorObservation
from shoal.policy.actions import Discrete
from shoal.policy.core import Core
from shoal.policy.cores import check_core, find_core, make_core
from shoal.policy.linear_recurrence import scan
from shoal.policy.make import make_policy
from shoal.policy.resets import plan_resets, zeroed

OWN = "own_cores:Leaky"
CORES = ["lstm", "gru", "linear", OWN]


def step_by_step(core, x, is_first, state, final):
    """The slow, obvious reference: outputs of all steps [T, B, H] and of the final rows [K, H], the last state."""
    steps, rows = is_first.shape
    outputs, finals = [], [None] * len(final[0])
    for t in range(steps):
        y, state = core.step(x[t * rows : (t + 1) * rows], is_first[t], state)
        outputs.append(y)
        for k in np.flatnonzero(final[0] == t):
            b = final[1][k]
            one = tuple(part[:, b : b + 1] for part in state)
            row = x[steps * rows + k][None]
            finals[k] = core.step(row, torch.zeros(1, dtype=torch.bool), one)[0][0]
    return torch.cat([*outputs, *([torch.stack(finals)] if finals else [])]), state


def make_case(name, seed, steps, rows, rate, final_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    core = make_core(name, {}, 5, 6).double()
    with torch.no_grad():
        for parameter in core.parameters():  # away from zeros and ones, which hide a parameter that is left out
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    is_first = torch.rand(steps, rows, generator=generator) < rate
    ends = is_first[1:] & (torch.rand(steps - 1, rows, generator=generator) < final_rate)
    final = tuple(part.numpy() for part in ends.nonzero(as_tuple=True))
    x = torch.randn(steps * rows + len(final[0]), 5, generator=generator, dtype=torch.float64)
    state = tuple(
        torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in core.initial_state(rows)
    )
    return core, x, is_first, state, final


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("return_state", [False, True])
@settings(max_examples=examples(80))
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 20),
    rows=st.integers(1, 9),
    rate=st.sampled_from([0, 0.02, 0.2, 0.7, 1]),
    final_rate=st.sampled_from([0, 0.5, 1]),
)
def test_unroll_equals_stepping(name, seed, steps, rows, rate, final_rate, return_state):
    """Catches a reset one step late or early, a stored state given to a later episode, a held row that goes on, a final
    row that is valued with another state or changes its row's."""
    core, x, is_first, state, final = make_case(name, seed, steps, rows, rate, final_rate)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    s1, s2 = (tuple(part.clone().requires_grad_() for part in state) for _ in range(2))
    want, want_state = step_by_step(core, x1, is_first, s1, final)
    plan = plan_resets(is_first.numpy(), final)
    got, got_state = core.unroll(x2, plan, is_first, s2, return_state=return_state)
    torch.testing.assert_close(got, want)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    targets = [(want * weight).sum(), (got * weight).sum()]
    if return_state:
        for got_part, want_part in zip(got_state, want_state, strict=True):
            torch.testing.assert_close(got_part, want_part)
        targets = [targets[0] + sum(p.sum() for p in want_state), targets[1] + sum(p.sum() for p in got_state)]
    parameters = list(core.parameters())
    want_grads = torch.autograd.grad(targets[0], [x1, *s1, *parameters], allow_unused=True)
    got_grads = torch.autograd.grad(targets[1], [x2, *s2, *parameters], allow_unused=True)
    for got_grad, want_grad, of in zip(got_grads, want_grads, [x, *state, *parameters], strict=True):
        zero = torch.zeros_like(of)
        torch.testing.assert_close(zero if got_grad is None else got_grad, zero if want_grad is None else want_grad)


@pytest.mark.parametrize(
    ("steps", "rows", "rate"), [(1, 1, 1), (2, 1, 1), (1, 5, 0.5), (33, 16, 0.03), (12, 8, 1), (9, 3, 0), (7, 70, 0.9)]
)
@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("name", CORES)
def test_the_float32_kernel_equals_stepping(name, steps, rows, rate, return_state):
    """Catches a library's kernel whose closed gates are only nearly 0, or that lays out weights in another way: the
    double precision of the test above takes other code."""
    core, x, is_first, state, final = make_case(name, steps, steps, rows, rate, 0.5)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.mul_(1.5)
        if name == "lstm":
            state[1].mul_(30)
    core, x, state = core.float(), x.float().requires_grad_(), tuple(part.float().requires_grad_() for part in state)
    want, want_state = step_by_step(core, x, is_first, state, final)
    plan = plan_resets(is_first.numpy(), final)
    got, got_state = core.unroll(x, plan, is_first, state, return_state=return_state)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    inputs = [x, *state, *core.parameters()]
    sums = [want.square().sum(), got.square().sum()]
    if return_state:
        torch.testing.assert_close(got_state, want_state, rtol=1e-4, atol=1e-4)
        sums = [y + sum(p.sum() for p in s) for y, s in zip(sums, (want_state, got_state), strict=True)]
    grads = [torch.autograd.grad(y, inputs, materialize_grads=True, allow_unused=True) for y in sums]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_gradient_crosses_a_reset(dtype, name):
    """Catches credit flowing into another episode: a gate that is closed but for a rounding error lets it through."""
    if name == "lstm" and dtype == torch.bfloat16 and not runs_bfloat16("cpu"):
        pytest.skip(NO_BFLOAT16)
    core, x, is_first, state, _ = make_case(name, 0, 8, 3, 0.0)
    is_first[4] = True
    wide = dtype if dtype == torch.float64 else torch.float32
    core, x, state = core.to(wide), x.to(wide).requires_grad_(), tuple(part.to(wide) * 1e6 for part in state)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, _ = core.unroll(x, plan_resets(is_first.numpy()), is_first, state, return_state=False)
    y[4 * 3 :].float().sum().backward()
    assert (x.grad[: 4 * 3] == 0).all()
    assert (x.grad[4 * 3 :] != 0).any()


@pytest.mark.parametrize("name", CORES)
def test_a_non_finite_state_dies_with_its_episode(name):
    """Catches 0 * inf: a reset by multiplication would poison the next episode."""
    core, x, is_first, state, _ = make_case(name, 0, 4, 2, 0.0)
    is_first[0] = True
    state[-1].fill_(float("inf"))
    y, _ = core.unroll(x, plan_resets(is_first.numpy()), is_first, state, return_state=False)
    assert y.isfinite().all()


@pytest.mark.parametrize("name", CORES)
def test_states_stay_in_float32_under_autocast(name):
    """Catches a state in bfloat16, which remembers two digits and is another than the actors'."""
    if name == "lstm" and not runs_bfloat16("cpu"):
        pytest.skip(NO_BFLOAT16)
    core, x, is_first, state, final = make_case(name, 3, 6, 4, 0.3, 0.5)
    core, x, state = core.float(), x.float(), tuple(part.float() for part in state)
    plan = plan_resets(is_first.numpy(), final)
    want, _ = core.unroll(x, plan, is_first, state)
    with torch.autocast("cpu", torch.bfloat16):
        got, last = core.unroll(x.bfloat16(), plan, is_first, state)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    if name != "lstm":  # oneDNN's LSTM returns h in bfloat16; whoever keeps it converts it
        assert {part.dtype for part in last} == {torch.float32}


@pytest.mark.parametrize("name", CORES)
def test_equal_seeds_give_equal_weights_whatever_stands_around(name):
    """Catches a core whose initial weights depend on the layers that were made before it."""
    found = []
    for observation in (VectorObservation(3), VectorObservation(9)):
        torch.manual_seed(4)
        found.append(FastPolicy(observation, ["a", "b"], core=name).core.state_dict())
    torch.manual_seed(4)
    components = {"fc1": {"size": 7}}
    other = make_policy(
        "component", VectorObservation(3), Discrete((("a", "b"),)), 10, components=components, core=name
    )
    for state in (found[1], other.core.state_dict()):
        for key, tensor in found[0].items():
            assert torch.equal(tensor, state[key])
    assert any(tensor.std() > 0 for tensor in found[0].values())


@pytest.mark.parametrize("name", CORES)
def test_the_check_accepts_what_fits(name):
    """Catches a check that refuses a right core, or that leaves something behind."""
    core = make_core(name, {}, 5, 6)
    before = torch.random.get_rng_state()
    check_core(core, name)
    assert torch.equal(before, torch.random.get_rng_state())
    assert core.training


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no layers", r"state trace has the shape \(6,\); it must begin with the number of layers"),
        ("taken name", "its state is named 'obs'"),
        ("bad name", "its state is named 'My State'"),
        ("nothing", "state_shapes is empty"),
        ("never resets", "lets the state through where is_first is set"),
        ("multiplies", "lets the state through where is_first is set"),
        ("looks at others", "unroll gives other outputs of a row alone than step"),
        ("draws", "lets the state through|unroll gives other outputs"),
        ("breaks", "fails: RuntimeError"),
        ("column", r"step gives outputs \[4, 1\] for 4 rows, must be \[4, 6\]"),
        ("grows", r"step gives the state \[\(\[1, 4, 2, 6\]"),
        ("double", "torch.float64.*must be"),
        ("forgets resets", "unroll gives other outputs than step"),
        ("last state", "unroll gives other state trace than step"),
        ("no state", "unroll returns no state"),
        ("final rows left out", r"unroll gives outputs \[24, 6\], must be \[25, 6\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(fault, expected, monkeypatch):
    """Catches a core whose learner trains another memory than its actors have, and messages that name nothing."""
    monkeypatch.setitem(cores_given, "here:Faulty", faulty(fault))
    with pytest.raises(ValueError, match=f"^core here:Faulty.*(?:{expected})"):
        check_core(make_core("here:Faulty", {}, 5, 6), "here:Faulty")


def test_names_and_arguments():
    """Catches a checkpoint of somebody's core that cannot say what to install, and arguments that nobody takes."""
    for name, expected in (
        ("no_such_pkg.cores:Core", "core no_such_pkg.cores:Core: there is no module 'no_such_pkg' here; install"),
        ("own_cores:Absent", "core own_cores:Absent: own_cores has no class Absent"),
        ("own_cores:Stranger", "expected a subclass of shoal.Core, got <class 'own_cores.Stranger'>"),
    ):
        with pytest.raises(ValueError, match=expected):
            find_core(name)
    for name, kwargs, expected in (
        (OWN, {"colour": 1}, r"unexpected keyword argument 'colour'. Its __init__ takes \(input_size, hidden_size\)"),
        ("own_cores:OtherSize", {}, "it has input_size=5 and hidden_size=12, must be 5 and 6"),
        ("own_cores:Nameless", {}, "lacks the property state_shapes"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_core(name, kwargs, 5, 6)
    assert make_core(OWN, {"halves": 3}, 5, 6).state_shapes["trace"] == (1, 3, 2)
    assert make_core("lstm", {"num_layers": 1}, 5, 6).state_shapes["h"] == (1, 6)


def test_a_core_without_a_step_says_so():
    """Catches a base class that passes for a memory."""
    with pytest.raises(NotImplementedError):
        Core(2, 2).step(torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool), ())


def test_a_state_of_any_rank_is_zeroed():
    """Catches rows of another dimension that are zeroed."""
    state = (torch.ones(2, 3, 4), torch.ones(1, 3, 4, 5))
    for part in zeroed(state, torch.tensor([False, True, False])):
        assert (part[:, 1] == 0).all()
        assert (part[:, [0, 2]] == 1).all()


@settings(max_examples=examples(40))
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 40),
    closed=st.sampled_from([0.0, 0.2, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_scan_equals_a_loop(seed, steps, closed, dtype):
    """Catches a pass that reads what it has written, rows beyond the last power of two, and a gradient of a row off."""
    generator = torch.Generator().manual_seed(seed)
    a, b, grad = (torch.rand(steps, 2, 3, generator=generator, dtype=dtype) for _ in range(3))
    a = a.masked_fill(torch.rand(steps, 2, 3, generator=generator) < closed, 0.0)
    before = torch.randn(2, 3, generator=generator, dtype=dtype)
    inputs = [part.requires_grad_() for part in (a, b, before)]
    h, rows = before, []
    for t in range(steps):
        h = a[t] * h + b[t]
        rows.append(h)
    want, got = torch.stack(rows), scan(a, b, before)
    torch.testing.assert_close(got, want)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), **tolerance
    )


def test_the_scan_is_as_exact_as_a_loop_over_long_segments():
    """Catches products of decays that leave float32's range, and differences of large sums, over 512 steps."""
    generator = torch.Generator().manual_seed(0)
    for lowest, highest in ((0.0, 1.0), (0.999, 1.0), (0.0, 1e-3)):
        a = torch.rand(512, 64, generator=generator, dtype=torch.float64) * (highest - lowest) + lowest
        b = torch.randn(512, 64, generator=generator, dtype=torch.float64)
        exact = scan(a, b, torch.zeros(64, dtype=torch.float64))
        found = scan(a.float(), b.float(), torch.zeros(64))
        scale = exact.abs().max()
        assert float((found - exact).abs().max() / scale) < 2e-6
