"""Memory by training_env_id, against acting one environment at a time."""

from __future__ import annotations

import pytest
import torch

from policy import FastPolicy, VectorObservation
from policy.memory import Memory


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return FastPolicy(VectorObservation(3), ["a", "b"])


@torch.no_grad()
def test_each_environment_keeps_its_own_state(policy):
    """States mixed up when the set or order of environments changes between calls."""
    generator = torch.Generator().manual_seed(1)
    alone = {}
    for ids in [(7, 3, 9), (7, 3, 9), (9, 7), (3,), (4, 3, 7, 9), (7, 3, 9)]:
        obs = torch.randn(len(ids), 3, generator=generator)
        first = torch.rand(len(ids), generator=generator) < 0.2
        output = policy.act(obs, ids, first)
        for i, env_id in enumerate(ids):
            want, alone[env_id] = policy.step(obs[i : i + 1], first[i : i + 1], alone.get(env_id))
            torch.testing.assert_close(output.logits[i : i + 1], want.logits, atol=1e-5, rtol=1e-5)
    for env_id, (h, c) in policy.get_memory().items():
        torch.testing.assert_close(h, alone[env_id][0][:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(c, alone[env_id][1][:, 0], atol=1e-5, rtol=1e-5)


def test_get_set_reset(policy):
    """A reset that forgets everyone, a set that aliases, a state that drags its graph along."""
    assert policy.has_memory()
    policy.act(torch.randn(2, 3), (1, 2), torch.zeros(2, dtype=torch.bool))
    saved = policy.get_memory()
    assert not any(part.requires_grad for state in saved.values() for part in state)
    policy.reset_memory([1])
    assert set(policy.get_memory()) == {2}
    policy.set_memory(saved)
    torch.testing.assert_close(policy.get_memory(), saved)
    policy.reset_memory()
    assert policy.get_memory() == {}
    with pytest.raises(ValueError, match="training_env_id 5"):
        policy.set_memory({5: (torch.zeros(1, 2), torch.zeros(1, 2))})
    with pytest.raises(ValueError, match="must differ"):
        policy.act(torch.randn(2, 3), (1, 1), torch.zeros(2, dtype=torch.bool))


def test_memory_is_no_part_of_the_weights(policy):
    """A checkpoint that carries one run's memory into another."""
    before = set(policy.state_dict())
    policy.act(torch.randn(2, 3), (1, 2), torch.zeros(2, dtype=torch.bool))
    assert set(policy.state_dict()) == before


def test_what_is_written_is_detached():
    """A graph that grows with every step, and gradients that flow from one unroll into the one before."""
    memory = Memory(2, 3)
    state = tuple(torch.randn(2, 2, 3, requires_grad=True) * 2 for _ in "hc")
    memory.write((7, 8), state)
    assert not any(part.requires_grad for part in memory.read((7, 8)))
    memory.write((8, 9), state)
    assert not any(part.requires_grad for part in (*memory.read((7, 8, 9)), *memory.get()[7]))
