"""V-trace against the paper's sum, written out episode by episode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.learner.vtrace import vtrace
from slow_reference import ABSENT, ENDS, FAULT, TERMINATED, TRUNCATED, draw_boundaries, episode_targets, episodes_of

CONSTANTS = {"gamma": 0.9, "lambda_": 0.8, "rho_bar": 1.1, "c_bar": 0.7}


def make_case(lengths, ends, steps, seed, begins_void, same_step):
    """One row of T transitions and those of its episodes that have any."""
    rng = np.random.default_rng(seed)
    is_first, terminated, truncated = draw_boundaries(
        lengths, ends, steps, begins_void=begins_void, same_step=same_step
    )
    value = rng.normal(0, 1, steps + 1)
    ended = terminated | truncated
    columns = {
        "log_rho": rng.normal(0, 0.7, steps),
        "reward": rng.normal(0, 1, steps),
        "value": value[:-1],
        # V of a final observation of its own, where the next row belongs to another episode.
        "next_value": np.where(ended & is_first[1:], rng.normal(0, 1, steps), value[1:]),
        "terminated": terminated,
        "ended": ended,
        "valid": ~is_first[1:] | ended,
    }
    return columns, [e for e in episodes_of(is_first, terminated, truncated) if e.end > e.begin]


def reference(columns, episodes, **constants):
    """The targets of one row, an episode at a time; V and 0 where nothing is valid."""
    vs, advantage = columns["value"].copy(), np.zeros(len(columns["reward"]))
    for begin, end, terminated, _ in episodes:
        steps = slice(begin, end)
        vs[steps], advantage[steps] = episode_targets(
            columns["log_rho"][steps],
            columns["reward"][steps],
            np.append(columns["value"][steps], columns["next_value"][end - 1]),
            terminated,
            **constants,
        )
    return vs, advantage


def ours(rows, **constants):
    tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows], 1)) for name in rows[0]}
    targets = vtrace(**tensors, **constants)
    return targets.vs.numpy(), targets.advantage.numpy()


@st.composite
def rows(draw, steps=14):
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=8))
    ends = [draw(st.sampled_from(ENDS)) for _ in lengths]
    return make_case(lengths, ends, steps, draw(st.integers(0, 2**31)), draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=examples(150))
@given(
    cases=st.lists(rows(), min_size=1, max_size=3),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lambda_=st.sampled_from([0.0, 0.8, 1.0]),
    rho_bar=st.sampled_from([0.5, 1.0, 3.0]),
    c_bar=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_targets_equal_the_paper_episode_by_episode(cases, gamma, lambda_, rho_bar, c_bar):
    """A trace over a boundary, a bootstrap of the terminated, none of the truncated, c and rho exchanged."""
    constants = {"gamma": gamma, "lambda_": lambda_, "rho_bar": rho_bar, "c_bar": c_bar}
    vs, advantage = ours([columns for columns, _ in cases], **constants)
    for b, (columns, episodes) in enumerate(cases):
        want_vs, want_advantage = reference(columns, episodes, **constants)
        np.testing.assert_allclose(vs[:, b], want_vs, atol=1e-10)
        np.testing.assert_allclose(advantage[:, b], want_advantage, atol=1e-10)


@pytest.mark.parametrize(
    ("same_step", "want", "void"),
    [
        (
            False,
            [(1, 4, 1), (5, 6, 0), (7, 9, 0), (10, 11, 1), (14, 18, 0)],
            [0, 4, 6, 9, 11, 12, 13],
        ),
        (True, [(0, 3, 1), (3, 4, 0), (5, 7, 0), (7, 8, 1), (10, 18, 0)], [4, 8, 9]),
    ],
)
def test_the_cases_hold_every_kind_of_end(same_step, want, void):
    """A generator of cases that never draws what the properties above are about."""
    ends = [TERMINATED, FAULT, TRUNCATED, ABSENT, TERMINATED]
    columns, episodes = make_case([3, 2, 2, 1, 9], ends, 18, 0, True, same_step)
    assert [episode[:3] for episode in episodes] == want
    assert [episode.final for episode in episodes] == [same_step and how != FAULT for how in [*ends[:4], FAULT]]
    assert np.flatnonzero(~columns["valid"]).tolist() == void


@settings(max_examples=60)
@given(case=rows(), which=st.integers(0, 100))
def test_nothing_leaks_across_an_episode(case, which):
    """Anything of one episode that reaches another's targets: changed numbers must change nobody else's."""
    columns, episodes = case
    begin, end, _, final = episodes[which % len(episodes)]
    changed = {name: column.copy() for name, column in columns.items()}
    for name in ("reward", "log_rho"):
        changed[name][begin:end] += 1.7
        changed[name][~columns["valid"]] += 5.0  # void transitions belong to nobody
    changed["value"][begin : end + (not final)] += 2.3  # its last row belongs to it where it has one of its own
    changed["next_value"][begin:end] += 2.3
    others = np.ones(len(columns["reward"]), bool)
    others[begin:end] = False
    others &= columns["valid"]
    for before, after in zip(ours([columns], **CONSTANTS), ours([changed], **CONSTANTS), strict=True):
        np.testing.assert_array_equal(before[others], after[others])


@settings(max_examples=60)
@given(case=rows())
def test_without_lag_it_is_gae(case):
    """An advantage that is not GAE(lambda), or value targets that are not advantage + V, where rho is 1."""
    columns, episodes = case
    columns["log_rho"] = np.zeros_like(columns["log_rho"])
    vs, advantage = ours([columns], gamma=0.9, lambda_=0.8)
    for begin, end, terminated, _ in episodes:
        total = 0.0
        for t in range(end - 1, begin - 1, -1):
            follows = 0.0 if terminated and t == end - 1 else columns["next_value"][t]
            total = columns["reward"][t] + 0.9 * follows - columns["value"][t] + 0.9 * 0.8 * total
            np.testing.assert_allclose(advantage[t, 0], total, atol=1e-10)
            np.testing.assert_allclose(vs[t, 0], total + columns["value"][t], atol=1e-10)


@settings(max_examples=60)
@given(case=rows())
def test_on_policy_without_lambda_it_is_the_discounted_return(case):
    """A discount one step off: lambda = 1 on-policy leaves nothing of V but the bootstrap."""
    columns, episodes = case
    columns["log_rho"] = np.zeros_like(columns["log_rho"])
    vs, _ = ours([columns], gamma=0.9)
    for begin, end, terminated, _ in episodes:
        total = 0.0 if terminated else columns["next_value"][end - 1]
        for t in range(end - 1, begin - 1, -1):
            total = columns["reward"][t] + 0.9 * total
            np.testing.assert_allclose(vs[t, 0], total, atol=1e-10)


def test_void_transitions_have_no_target_of_their_own():
    """A void transition that is moved towards something: vs must be V, the advantage 0."""
    columns, _ = make_case([2, 3, 2], [TRUNCATED, TERMINATED, TERMINATED], 14, 3, True, False)
    vs, advantage = ours([columns], **CONSTANTS)
    void = ~columns["valid"]
    assert void.sum() == 4
    np.testing.assert_array_equal(vs[void, 0], columns["value"][void])
    np.testing.assert_array_equal(advantage[void, 0], 0)


@pytest.mark.parametrize("case", ["default", "rho2_c05", "gamma1_lambda1"])
def test_golden_kernel(golden, case):
    """Another recursion than the original's kernel, which stores reward and end one column later and drops the last."""
    with np.load(golden / "advantage.npz") as file:
        values, rewards, dones, importance, advantages, params = (
            file[f"{case}/{name}"] for name in ("values", "rewards", "dones", "importance", "advantages", "params")
        )
    gamma, lambda_, rho_bar, c_bar = params.tolist()
    targets = vtrace(
        torch.from_numpy(importance.T[:-1]).log(),
        torch.from_numpy(rewards.T[1:]),
        torch.from_numpy(values.T[:-1]),
        torch.from_numpy(values.T[1:]),
        torch.from_numpy(dones.T[1:] > 0),
        torch.from_numpy(dones.T[1:] > 0),
        torch.ones(9, 6, dtype=torch.bool),
        gamma=gamma,
        lambda_=lambda_,
        rho_bar=rho_bar,
        c_bar=c_bar,
    )
    want = advantages.T
    assert dones.any()
    assert (want[-1] == 0).all()
    np.testing.assert_allclose(targets.vs.numpy() - values.T[:-1], want[:-1], rtol=1e-4, atol=1e-5)
