"""torch.compile changes how fast a policy is and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import ACTIONS, OBSERVATIONS, POLICIES, draw_is_first, draw_state, make_pair, observe
from shoal.policy.resets import plan_resets

# torch's own, while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
T, B = 6, 4
every_policy = pytest.mark.parametrize("kind", POLICIES)
# `eager` traces and cuts the graph as every backend does, and makes no code; `inductor` is what users get.
# Tokens cut the graph at a shape that depends on the data, and tracing the pieces takes its time.
every_backend = pytest.mark.parametrize(
    ("backend", "sort"),
    [("eager", "vector"), pytest.param("inductor", "tokens", marks=pytest.mark.slow)],
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(kind, sort):
    return dict(zip(POLICIES, make_pair(OBSERVATIONS[sort], ACTIONS["discrete"]), strict=True))[kind]


@every_backend
@every_policy
@torch.no_grad()
def test_step(kind, backend, sort):
    """A reset or a state that was constant while tracing and stays so: the compiled policy never forgets."""
    policy = make(kind, sort)
    compiled = torch.compile(policy.step, backend=backend)
    obs, is_first, state = observe(OBSERVATIONS[sort], T, B), draw_is_first(T, B), draw_state(policy, B)
    ours = state
    for t in range(T):
        want, state = policy.step(obs[t], is_first[t], state)
        got, ours = compiled(obs[t], is_first[t], ours)
        torch.testing.assert_close(got, want, **CLOSE)
        torch.testing.assert_close(ours, state, **CLOSE)


@every_backend
@every_policy
def test_unroll(kind, backend, sort):
    """A plan of resets that was traced once and used for every batch; gradients that end at a graph's edge."""
    policy = make(kind, sort)
    compiled = torch.compile(policy.unroll, backend=backend)
    for seed in range(2):
        obs, is_first, state = (
            observe(OBSERVATIONS[sort], T, B, seed=seed),
            draw_is_first(T, B, seed),
            draw_state(policy, B),
        )
        found = []
        plan = plan_resets(is_first.numpy()) if sort == "vector" else None
        for unroll in (policy.unroll, compiled):
            output, _ = unroll(obs, is_first, state, plan=plan, return_state=False)
            loss = output.logits.square().sum() + output.value.sum()
            found.append((output[:2], torch.autograd.grad(loss, list(policy.parameters()))))
        torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@every_backend
@every_policy
@torch.no_grad()
def test_memory_by_training_env_id(kind, backend, sort):
    """Memory that a compiled policy reads and does not write, or that stays with the ids it was traced with."""
    policy = make(kind, sort)
    eager = copy.deepcopy(policy)
    act = torch.compile(policy.act, backend=backend)
    obs, is_first = observe(OBSERVATIONS[sort], T, B), draw_is_first(T, B)
    for t in range(4):
        ids = [10, 11, 12, 13] if t < 2 else [13, 14, 11, 10]
        want = eager.act(obs[t], ids, is_first[t])
        torch.testing.assert_close(act(obs[t], ids, is_first[t]), want, **CLOSE)
    assert set(policy.get_memory()) == {10, 11, 12, 13, 14}
    torch.testing.assert_close(policy.get_memory(), eager.get_memory(), **CLOSE)
    policy.reset_memory()
    eager.reset_memory()
    want = eager.act(obs[0], [10, 11, 12, 13], is_first[0])
    torch.testing.assert_close(act(obs[0], [10, 11, 12, 13], is_first[0]), want, **CLOSE)
